"""Bases with experts and their calibrations, made once for all tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import CalibrationResult, calibrate
from tests import pico
from tests.experts.families import FAMILIES, Seen, save, seen_by_experts, stacks

MAX_LENGTH = 40
RATIO = 0.5
SOURCE = Path(__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[100 * number :][:length] for number, length in enumerate((12, 25, 60, 18, 31, 40))]


@dataclass(frozen=True)
class Case:
    """A base on disk and in memory, its data, a calibration with gradients, and what its experts saw."""

    family: str
    base: Path
    model: Any
    data: Path
    calibration: Path
    result: CalibrationResult
    W: dict[str, torch.Tensor]
    seen: dict[str, Seen]


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The case of a family; tests never write into it."""
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            model = save(root / "base", family)
            data = pico.write_jsonl(root / "train.jsonl", [{"text": text} for text in TEXTS])
            result = calibrate(
                base=str(root / "base"),
                data=data,
                output=root / "calibration",
                max_length=MAX_LENGTH,
                gradients=True,
                batch_size=4,
                device="cpu",
            )
            seen = seen_by_experts(model, family, pico.token_ids(data, root / "base", MAX_LENGTH))
            W = stacks(model, family)
            made[family] = Case(family, root / "base", model, data, root / "calibration", result, W, seen)
        return made[family]

    return make


@pytest.fixture(scope="session", params=list(FAMILIES))
def built(request: pytest.FixtureRequest, case_of: Callable[[str], Case], tmp_path_factory: Any) -> tuple[Case, Path]:
    """A case and its emulator, unweighted, all layers at one ratio."""
    case, output = case_of(request.param), tmp_path_factory.mktemp("built") / "emulator"
    options: dict[str, Any] = {"weighting": "none", "allocation": "uniform"}
    build_emulator(base=str(case.base), calibration=case.calibration, ratio=RATIO, output=output, **options)
    return case, output
