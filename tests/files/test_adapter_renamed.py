"""Adapters read under other names hold what they held, with the ranks and scalings that their own names gave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_tools.errors import FormatError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.adapter_renamed import RenamedAdapter, open_renamed
from tests.files.lora import PREFIX, change, train

WEIGHTS = "adapter_model.safetensors"


def naming(rename: Callable[[str], str]) -> Callable[[Adapter, Sequence[str]], Mapping[str, str]]:
    return lambda adapter, names: {name: rename(name) for name in names}


def opened(folder: Path, rename: Callable[[str], str]) -> RenamedAdapter:
    adapter = open_renamed(folder, naming(rename))
    adapter.close()
    return adapter


def to_layers(name: str) -> str:
    return name.replace("block.", "layers.")


def test_tensors_are_read_by_their_new_names(tmp_path: Path) -> None:
    train(tmp_path, modules_to_save=["score"])
    stored = load_file(tmp_path / WEIGHTS)
    adapter = open_renamed(tmp_path, naming(to_layers))
    assert adapter.tensors.names() == sorted(map(to_layers, stored))
    for name, tensor in stored.items():
        assert torch.equal(adapter.read(to_layers(name)), tensor)
        spec = adapter.tensors.spec(to_layers(name))
        assert (spec.name, spec.shape, spec.dtype) == (to_layers(name), tuple(tensor.shape), tensor.dtype)
    assert adapter.renamed == {name: to_layers(name) for name in stored if "block." in name}
    assert set(adapter.loras) == {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"}
    adapter.close()


def test_names_that_stay_make_the_adapter_as_it_is(tmp_path: Path) -> None:
    train(tmp_path)
    plain = Adapter(tmp_path)
    plain.close()
    adapter = opened(tmp_path, lambda name: name)
    assert (adapter.loras, adapter.renamed) == (plain.loras, {})


def test_ranks_and_scalings_are_those_that_the_old_names_gave(tmp_path: Path) -> None:
    """Under the new names the patterns mean nothing: A and B would have other ranks than the configuration says."""
    train(tmp_path, rank_pattern={r"block\.1\..*": 4}, alpha_pattern={"block.0.up": 9}, use_rslora=True)
    plain = Adapter(tmp_path)
    plain.close()
    adapter = opened(tmp_path, to_layers)
    for module, keys in plain.loras.items():
        found = adapter.loras[to_layers(module)]
        assert (found.rank, found.scaling) == (keys.rank, keys.scaling)
    same = {module: adapter.means_the_same(module) for module in adapter.loras}
    assert same == {"layers.0.up": False, "layers.0.down": True, "layers.1.up": False, "layers.1.down": False}
    copy = tmp_path / "renamed"
    copy.mkdir()
    save_file({to_layers(k): v for k, v in load_file(tmp_path / WEIGHTS).items()}, copy / WEIGHTS)
    (copy / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(FormatError, match="says rank=2"):  # the control
        Adapter(copy)


def test_rules_of_the_format_hold_for_the_new_names(tmp_path: Path) -> None:
    train(tmp_path)

    def torn(name: str) -> str:
        return name.replace("block.0.up.lora_A", "block.0.side.lora_A")

    with pytest.raises(FormatError, match="although its partner is there"):
        opened(tmp_path, torn)
    change(tmp_path / "adapter_config.json", lambda config: config.update(peft_type="IA3"))
    with pytest.raises(FormatError, match="only LORA adapters can be used"):
        opened(tmp_path, to_layers)


def test_the_new_name_of_a_module_is_found_by_its_old_one(tmp_path: Path) -> None:
    train(tmp_path)
    adapter = opened(tmp_path, to_layers)
    assert adapter.new_module("block.1.down") == "layers.1.down"
    assert opened(tmp_path, lambda name: name).new_module("block.1.down") == "block.1.down"
    assert all(name.startswith(PREFIX) for name in adapter.renamed)


def test_other_names_are_shown_with_what_mends_them(tmp_path: Path) -> None:
    train(tmp_path)
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    message = r"holds no .* pair .* but block\.0\.down\.lora_A\.weight; emloc-tools verify --fix writes one that has"
    with pytest.raises(FormatError, match=message):
        Adapter(tmp_path)
    adapter = opened(tmp_path, lambda name: PREFIX + name)
    assert set(adapter.loras) == {"block.0.up", "block.0.down", "block.1.up", "block.1.down"}
