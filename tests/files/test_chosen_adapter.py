"""Adapters that were chosen by held-out loss are version 2; all others stay version 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from emloc_tools.errors import FormatError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.adapter_writer import write_adapter
from emloc_tools.files.manifest import Candidate, Selection, made_by
from tests.files.lora import change, train
from tests.files.making import BASE, DATA, HASH

ERRORS = {"standard_error": 0.5, "standard_error_to_none": 0.25, "standard_error_to_corrected": 0.125}


def candidate(adapter: Any, scale: float, loss: float) -> Candidate:
    return Candidate(adapter=adapter, scale=scale, loss=loss, **ERRORS)


CANDIDATES = [candidate("none", 0.0, 3.0), candidate("trained", 1.0, 2.5), candidate("corrected", 1.0, 2.75)]


def write(folder: Path, selection: Selection | None) -> Path:
    """An adapter as it was trained, passed on without a correction."""
    train(folder / "trained")
    (folder / "out").mkdir()
    adapter = Adapter(folder / "trained")
    tensors = {name: adapter.read(name) for name in adapter.tensors.names()}
    fields = {
        "made_by": made_by("test"),
        "base": BASE,
        "emulator": HASH,
        "trained_adapter": adapter.hash,
        "clamp": 3.0,
        "layers": {},
        "unchanged": list(tensors),
    }
    write_adapter(folder / "out", adapter.config, tensors, fields=fields, selection=selection)
    adapter.close()
    return folder / "out"


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    return write(tmp_path, Selection(data=DATA, candidates=CANDIDATES, chosen=1))


def version_in_header(folder: Path) -> int:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        mark = json.loads(file.metadata()["emloc"])
    assert mark.pop("corrected") is True
    return int(mark.pop("format_version"))


def test_a_choice_makes_version_2_in_manifest_and_mark_and_is_read_back(chosen: Path) -> None:
    value = json.loads((chosen / "emloc.json").read_text())
    assert (value["format_version"], version_in_header(chosen)) == (2, 2)
    assert value["selection"]["candidates"][1] == {"adapter": "trained", "scale": 1.0, "loss": 2.5, **ERRORS}
    adapter = Adapter(chosen)
    assert adapter.corrected
    assert adapter.manifest is not None
    assert adapter.manifest.model_dump(mode="json") == value
    adapter.close()


def test_without_a_choice_the_version_is_1(tmp_path: Path) -> None:
    folder = write(tmp_path, None)
    value = json.loads((folder / "emloc.json").read_text())
    assert (value["format_version"], version_in_header(folder)) == (1, 1)
    assert "selection" not in value


def test_version_2_without_its_field_is_called_so(chosen: Path) -> None:
    change(chosen / "emloc.json", lambda m: m.pop("selection"))
    with pytest.raises(FormatError, match=r"format_version: is 2, .* field `selection`, which is not there .*A8"):
        Adapter(chosen)


@pytest.mark.parametrize(
    ("update", "rule", "field"),
    [
        ({"chosen": 0}, "A15", "selection.chosen"),
        ({"chosen": 3}, "A15", "selection.chosen"),
        ({"chosen": -1}, "A9", "selection.chosen"),
        ({"chosen": True}, "A9", "selection.chosen"),
        ({"candidates": CANDIDATES[1:]}, "A14", "selection.candidates"),
        ({"candidates": CANDIDATES[:2]}, "A14", "selection.candidates"),
        ({"candidates": [*CANDIDATES, CANDIDATES[1]]}, "A14", "selection.candidates.3"),
        ({"candidates": [*CANDIDATES, candidate("corrected", 0.0, 1.0)]}, "A14", "selection.candidates.3.scale"),
    ],
)
def test_a_table_that_fits_nothing_is_refused(chosen: Path, update: dict[str, Any], rule: str, field: str) -> None:
    plain = {
        key: [each.model_dump() for each in value] if isinstance(value, list) else value
        for key, value in update.items()
    }
    change(chosen / "emloc.json", lambda m: m["selection"].update(plain))
    with pytest.raises(FormatError) as caught:
        Adapter(chosen)
    assert (caught.value.rule, caught.value.field) == (rule, field)


def test_a_loss_that_is_no_number_cannot_be_written() -> None:
    for loss in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="loss"):
            candidate("trained", 1.0, loss)
    assert candidate("trained", 1.0, float(torch.tensor(2.0))).loss == 2.0
