"""correct --data: what cannot be measured is refused before anything is corrected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import correct
from tests import pico
from tests.conftest import Run


def refuse(run: Run, tmp_path: Path, kind: type[Exception], message: str, **options: Any) -> None:
    """Nothing is corrected before the refusal, and nothing written."""
    steps: list[Any] = []
    chosen = {"emulator": run.emulator, "adapter": run.adapter, "base": str(run.base), **options}
    with pytest.raises(kind, match=message):
        correct(output=tmp_path / "out", progress=steps.append, **chosen)
    assert steps == []
    assert not (tmp_path / "out").exists()


def test_a_choice_without_data_is_refused(run: Run, tmp_path: Path) -> None:
    refuse(run, tmp_path, InputError, "--select needs --data", select=True)


def test_a_single_sample_with_targets_is_refused(run: Run, tmp_path: Path) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "a few words"}, {"text": "a"}])
    refuse(
        run, tmp_path, InputError, "gives 1 sample with a token to predict; a comparison needs at least 2", data=data
    )


def test_saved_modules_cannot_be_measured_yet(run: Run, tmp_path: Path) -> None:
    pico.save_lora(tmp_path / "adapter", run.emulator, modules_to_save=["lm_head"])
    message = r"holds base_model\.model\.lm_head\.weight beside .*; losses cannot be measured with such tensors yet"
    refuse(run, tmp_path, UnsupportedError, message, adapter=tmp_path / "adapter", data=run.data)
    correct(emulator=run.emulator, adapter=tmp_path / "adapter", base=str(run.base), output=tmp_path / "out")


def test_a_model_that_does_not_predict_the_next_token_cannot_be_measured(
    case_of: Callable[[str], Any], run: Run, tmp_path: Path
) -> None:
    case = case_of("bert")
    build_emulator(base=str(case.base), calibration=case.calibration, ratio=0.5, output=tmp_path / "emulator")
    options: dict[str, Any] = {"task_type": None, "target_modules": r".*encoder\.layer\..*(query|key|value|dense)"}
    pico.save_lora(tmp_path / "adapter", tmp_path / "emulator", **options)
    places = {"emulator": tmp_path / "emulator", "adapter": tmp_path / "adapter", "base": str(case.base)}
    refuse(run, tmp_path, UnsupportedError, "BertForMaskedLM does not predict the next token", data=run.data, **places)
