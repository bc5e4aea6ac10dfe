"""Fixtures that several rooms' tests share, and an environment in which nothing reaches the network."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before the first import of huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="emloc-tests-hf-")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

from tests import pico

RATIO = 0.5


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@dataclass(frozen=True)
class Run:
    """The folders of a finished pico run, and its base in memory. Tests read them and never write into them."""

    base: Path
    model: Any
    data: Path
    calibration: Path
    emulator: Path
    adapter: Path
    corrected: Path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A Llama taken through every stage by the stage functions, at ratio 0.5, with a LoRA of rank 4 and alpha 6."""
    from emloc_tools.stages.build_emulator import build_emulator
    from emloc_tools.stages.calibrate import calibrate
    from emloc_tools.stages.correct import correct

    root = tmp_path_factory.mktemp("run")
    base, calibration, emulator = root / "base", root / "calibration", root / "emulator"
    adapter, corrected = root / "adapter", root / "corrected"
    model = pico.save_model(base)
    data = pico.save_texts(root / "train.jsonl")
    calibrate(base=str(base), data=data, output=calibration, device="cpu", max_length=32, batch_size=2)
    build_emulator(base=str(base), calibration=calibration, ratio=RATIO, output=emulator)
    pico.save_lora(adapter, emulator)
    correct(emulator=emulator, adapter=adapter, base=str(base), output=corrected)
    return Run(base, model, data, calibration, emulator, adapter, corrected)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
