"""Bases of several families with their calibrations, made once for all tests of the stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from emloc_tools.stages.calibrate import CalibrationResult, calibrate
from tests import pico
from tests.stages.reference import Moments, moments

MAX_LENGTH = 72  # cuts some of the texts and not others
# The reference sees linear layers; test_experts has its own for experts.
EXCLUDED = {"qwen3-moe": "experts"}


@dataclass(frozen=True)
class Case:
    """A base on disk and in memory, its data, its calibration, and what hooks on the model in memory saw."""

    family: str
    base: Path
    model: Any
    data: Path
    calibration: Path
    result: CalibrationResult
    moments: dict[str, Moments]


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The case of a family; tests never write into it."""
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            model = pico.save_model(root / "base", family)
            data = pico.save_texts(root / "train.jsonl", count=8)
            result = calibrate(
                base=str(root / "base"),
                data=data,
                output=root / "calibration",
                max_length=MAX_LENGTH,
                exclude=EXCLUDED.get(family),
                device="cpu",
                command="make the case",
            )
            seen = moments(model, pico.token_ids(data, root / "base", MAX_LENGTH))
            made[family] = Case(family, root / "base", model, data, root / "calibration", result, seen)
        return made[family]

    return make


@pytest.fixture(scope="session")
def llama(case_of: Callable[[str], Case]) -> Case:
    """The case of most tests."""
    return case_of("llama")


@pytest.fixture(scope="session")
def weighted_case_of(case_of: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The case of a family with the gradients of the loss in its calibration."""
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            case, output = case_of(family), tmp_path_factory.mktemp(f"{family}-weighted") / "calibration"
            result = calibrate(
                base=str(case.base),
                data=case.data,
                output=output,
                max_length=MAX_LENGTH,
                exclude=EXCLUDED.get(family),
                gradients=True,
                device="cpu",
                command="make the case",
            )
            made[family] = replace(case, calibration=output, result=result)
        return made[family]

    return make


@pytest.fixture(scope="session")
def weighted(weighted_case_of: Callable[[str], Case]) -> Case:
    """The case of most tests of gradients."""
    return weighted_case_of("llama")
