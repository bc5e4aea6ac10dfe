"""Corrected adapters are known, protected against changes, and still PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, safe_open, save_file

from emloc_tools.errors import FormatError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.adapter_writer import write_adapter
from emloc_tools.files.manifest import made_by
from tests.files.lora import NAMES, PREFIX, Tiny, change, train
from tests.files.making import BASE, HASH


def correct(folder: Path, trained: Path) -> dict[str, torch.Tensor]:
    """Write a corrected adapter: `block.0.up` has new factors, all else is unchanged."""
    folder.mkdir()
    adapter = Adapter(trained)
    tensors = {name: adapter.read(name) for name in adapter.tensors.names()}
    keys = adapter.loras["block.0.up"]
    tensors |= {keys.A: torch.eye(2, 4), keys.B: torch.arange(12.0).view(6, 2)}
    report = {"directions": 2, "clamped": 1, "delta_norm": 0.5, "update_norm": 2.0}
    write_adapter(
        folder,
        {**adapter.config, "base_model_name_or_path": "example/base", "unknown_field": [1]},
        tensors,
        fields={
            "made_by": made_by("test"),
            "base": BASE,
            "emulator": HASH,
            "trained_adapter": adapter.hash,
            "clamp": None,
            "layers": {"block.0.up": {"rank": keys.rank, "scaling": keys.scaling, **report}},
            "unchanged": [name for name in tensors if name not in (keys.A, keys.B)],
        },
    )
    adapter.close()
    return tensors


@pytest.fixture
def corrected(tmp_path: Path) -> Path:
    train(tmp_path / "trained", use_rslora=True)
    correct(tmp_path / "corrected", tmp_path / "trained")
    return tmp_path / "corrected"


def test_peft_loads_a_corrected_adapter_and_gets_its_values(tmp_path: Path) -> None:
    train(tmp_path / "trained", use_rslora=True)
    tensors = correct(tmp_path / "corrected", tmp_path / "trained")
    loaded = PeftModel.from_pretrained(Tiny(), tmp_path / "corrected")
    ours = Adapter(tmp_path / "corrected")
    assert ours.corrected
    for name in NAMES:
        layer, keys = loaded.get_submodule(f"{PREFIX}{name}"), ours.loras[name]
        assert torch.equal(layer.lora_A["default"].weight, tensors[keys.A])
        assert torch.equal(layer.lora_B["default"].weight, tensors[keys.B])
        assert layer.scaling["default"] == keys.scaling
    ours.close()


def test_the_mark_is_in_the_header_and_unknown_fields_pass_through(corrected: Path) -> None:
    with safe_open(corrected / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["emloc"]) == {"corrected": True, "format_version": 1}
    assert json.loads((corrected / "adapter_config.json").read_text())["unknown_field"] == [1]


def test_files_that_are_copied_one_by_one_still_say_that_they_are_corrected(corrected: Path) -> None:
    (corrected / "emloc.json").unlink()
    with pytest.raises(FormatError, match=r"marks a corrected adapter, but emloc\.json is gone.*A10"):
        Adapter(corrected)


@pytest.mark.parametrize(
    "mark",
    [
        "",
        "yes",
        "{}",
        '{"corrected": true}',
        '{"corrected": false, "format_version": 1}',
        '{"corrected": true, "format_version": 2}',
        '{"corrected": 1, "format_version": 1}',
        '{"corrected": true, "format_version": true}',
        '{"corrected": true, "format_version": 1, "format_version": 1}',
        '{"corrected": [], "format_version": {}}',
    ],
)
def test_any_other_mark_is_refused(corrected: Path, mark: str) -> None:
    path = corrected / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "emloc": mark})
    with pytest.raises(FormatError) as caught:
        Adapter(corrected)
    assert (caught.value.rule, caught.value.field) == ("A10", "emloc")


def test_a_corrected_adapter_that_was_trained_further_is_noticed(corrected: Path) -> None:
    """A trainer that keeps the metadata, or a merge of adapters, would otherwise pass for the corrected one."""
    path = corrected / "adapter_model.safetensors"
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(stored, path, metadata=metadata)
    Adapter(corrected).close()  # written again without a change
    stored[f"{PREFIX}block.1.up.lora_B.weight"][0, 0] += 1e-3
    save_file(stored, path, metadata=metadata)
    with pytest.raises(FormatError, match=r"block\.1\.up\.lora_B\.weight: is not what was written.*A11"):
        Adapter(corrected)


@pytest.mark.parametrize(
    ("update", "rule"),
    [
        (lambda m: m["layers"]["block.0.up"].update(scaling=1.5), "A13"),
        (lambda m: m["layers"]["block.0.up"].update(rank=3), "A13"),
        (lambda m: m["layers"].update(absent=m["layers"]["block.0.up"]), "A12"),
        (lambda m: m["unchanged"].append(f"{PREFIX}block.0.up.lora_A.weight"), "A12"),
        (lambda m: m["unchanged"].append(m["unchanged"][0]), "A12"),
        (lambda m: m["unchanged"].pop(), "A12"),
        (lambda m: m["tensors"].popitem(), "A11"),
        (lambda m: m["tensors"].update(absent=HASH), "A11"),
    ],
)
def test_a_report_that_is_not_of_this_adapter_is_refused(
    corrected: Path, update: Callable[[Any], object], rule: str
) -> None:
    change(corrected / "emloc.json", update)
    with pytest.raises(FormatError) as caught:
        Adapter(corrected)
    assert caught.value.rule == rule


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    train(tmp_path / "trained")
    for name in ("one", "two"):
        correct(tmp_path / name, tmp_path / "trained")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
