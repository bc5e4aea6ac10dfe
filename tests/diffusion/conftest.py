"""A tiny pipeline taken through recording, calibration and building, once for all tests of this room.

diffusers has no release for Python 3.10 that goes with huggingface-hub 2, so the room is closed there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

RATIO = 0.35
STEPS = 6
TRAINING = ("a red dog on a bed", "two blue cars", "the old house", "green tea", "a bird in the snow", "a boat at sea")
HELD_OUT = ("a cat under a tree", "three yellow boxes", "a tall man")

if sys.version_info < (3, 11):
    collect_ignore_glob = ["test_*.py"]


@dataclass(frozen=True)
class Case:
    """A pipeline on disk, its transformer in memory, and what was made from it. Tests never write into it."""

    pipeline: Path
    model: Any
    inputs: Path
    heldout: list[dict[str, torch.Tensor]]
    calibration: Path
    emulator: Path
    plain: Path

    @property
    def base(self) -> str:
        return str(self.pipeline)


def calls_in(path: Path) -> list[dict[str, torch.Tensor]]:
    """The calls in a file of ready inputs, each its arguments."""
    calls: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        number, argument = name.split("/")
        calls.setdefault(int(number), {})[argument] = tensor
    return [calls[number] for number in sorted(calls)]


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The case of most tests."""
    from emloc_tools.models.recording import record_inputs
    from emloc_tools.stages.build_emulator import build_emulator
    from emloc_tools.stages.calibrate import calibrate
    from tests.diffusion import pico_flux

    root = tmp_path_factory.mktemp("flux")
    model = pico_flux.save_pipeline(root / "pipeline")
    pipeline = pico_flux.load_pipeline(root / "pipeline")
    for name, prompts, keep in (("train", TRAINING, 3), ("heldout", HELD_OUT, 2)):
        with record_inputs(pipeline.transformer, root / f"{name}.safetensors", per_run=keep) as recorder:
            for number, prompt in enumerate(prompts):
                with recorder.run():
                    generator = torch.Generator().manual_seed(number + 100 * len(name))
                    options = {"num_inference_steps": STEPS, "output_type": "latent", **pico_flux.SIZE}
                    pipeline(prompt=prompt, generator=generator, **options)
    base, calibration = str(root / "pipeline"), root / "calibration"
    calibrate(base=base, data=root / "train.safetensors", output=calibration, device="cpu")
    build_emulator(base=base, calibration=calibration, ratio=RATIO, output=root / "emulator")
    build_emulator(base=base, ratio=RATIO, output=root / "plain")
    heldout = calls_in(root / "heldout.safetensors")
    inputs = root / "train.safetensors"
    return Case(root / "pipeline", model, inputs, heldout, calibration, root / "emulator", root / "plain")
