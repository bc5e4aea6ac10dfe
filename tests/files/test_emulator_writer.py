"""What an emulator folder holds besides the factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.emulator_writer import EmulatorWriter
from emloc_tools.files.manifest import WeightingRecord
from emloc_tools.files.tensors import TensorSpec
from tests.files.making import SHAPES, save_emulator


def test_the_base_s_configuration_keeps_its_keys_values_and_order(tmp_path: Path) -> None:
    base = {
        "rope_theta": 1e4,
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "unknown": {"nested": [None, 1]},
    }
    save_emulator(tmp_path / "e", config=base)
    written = json.loads((tmp_path / "e" / "config.json").read_text())
    ours = ("architectures", "auto_map", "emloc")
    assert {key: value for key, value in written.items() if key not in ours} == {
        key: value for key, value in base.items() if key not in ours
    }
    assert list(written)[: len(base)] == list(base)
    assert written["architectures"] == ["EmlocLlamaForCausalLM"]
    assert written["emloc"] == {"format_version": 1, "ranks": dict.fromkeys(SHAPES, 2)}
    assert base["architectures"] == ["LlamaForCausalLM"]  # the caller's object is not changed


def test_a_weighting_makes_version_2_and_changes_nothing_else_in_the_folder(tmp_path: Path) -> None:
    save_emulator(tmp_path / "plain")
    save_emulator(tmp_path / "weighted", weighting=WeightingRecord(damping=0.05, sensitivity={}))
    plain, weighted = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("plain", "weighted")
    )
    assert {name for name in plain if plain[name] != weighted[name]} == {"config.json", "emulator.json"}
    assert plain.keys() == weighted.keys()
    configs, manifests = (
        [json.loads(files[name]) for files in (plain, weighted)] for name in ("config.json", "emulator.json")
    )
    assert [config["emloc"].pop("format_version") for config in configs] == [1, 2]
    assert configs[0] == configs[1]
    assert [manifest.pop("format_version") for manifest in manifests] == [1, 2]
    assert manifests[1].pop("weighting") == {"damping": 0.05, "sensitivity": {}}
    assert manifests[1].pop("calibration") is not None  # there is no gradient without one
    assert manifests[0].pop("calibration") is None
    assert manifests[0] == manifests[1]


def test_a_quantised_base_is_refused_and_an_empty_quantisation_left_out(tmp_path: Path) -> None:
    """Trainers look whether the key is there, not what it holds."""
    with pytest.raises(UnsupportedError, match="the base is quantised"):
        save_emulator(tmp_path / "a", config={"quantization_config": {"quant_method": "fp8"}})
    save_emulator(tmp_path / "b", config={"quantization_config": None, "kept": None})
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert "kept" in json.loads((tmp_path / "b" / "config.json").read_text())
    Emulator(tmp_path / "b").close()


@pytest.mark.parametrize("max_shard_size", [1 << 40, 100])
def test_parameters_count_every_value_but_the_guard_and_the_index_counts_bytes(
    tmp_path: Path, max_shard_size: int
) -> None:
    manifest = save_emulator(tmp_path / "e", max_shard_size=max_shard_size)
    tensors: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "e").glob("*.safetensors"):
        tensors |= load_file(path)
    guard = tensors.pop("block.0.down.weight")
    assert guard.shape == (1,)
    assert manifest.parameters == sum(value.numel() for value in tensors.values())
    index = tmp_path / "e" / "model.safetensors.index.json"
    assert index.exists() == (max_shard_size == 100)
    if index.exists():
        total = sum(value.nbytes for value in tensors.values()) + guard.nbytes
        assert json.loads(index.read_text())["metadata"] == {"total_size": total}


def test_every_weights_file_says_that_it_is_for_pytorch_and_nothing_more(tmp_path: Path) -> None:
    save_emulator(tmp_path / "e", max_shard_size=100)
    paths = list((tmp_path / "e").glob("*.safetensors"))
    assert len(paths) > 1
    for path in paths:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_tensors_lie_in_the_order_of_the_model_s_layers(tmp_path: Path) -> None:
    """Layer 10 comes after layer 9, so that a loader walks through the shards once."""
    dense = [TensorSpec(f"layers.{index}.weight", torch.float32, (1,)) for index in range(12)]
    writer = EmulatorWriter(tmp_path, dense=dense, factored={"z": (2, 2, 1)}, dtype=torch.float32, max_shard_size=4)
    writer.close()
    shards = [writer.tensors.weight_map[f"layers.{index}.weight"] for index in range(12)]
    assert shards == sorted(shards)
    assert len(set(shards)) == 12


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_emulator(tmp_path / name, max_shard_size=100)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_an_emulator_with_a_missing_tensor_is_never_finished(tmp_path: Path) -> None:
    writer = EmulatorWriter(tmp_path, dense=[], factored={"z": (2, 2, 1)}, dtype=torch.float32, max_shard_size=100)
    with pytest.raises(ValueError, match="never written"):
        writer.finish(base_config={}, class_name="EmlocX", auto_map={}, modeling_file="m", modeling="", fields={})
    writer.close()
    assert not (tmp_path / "emulator.json").exists()


def test_the_card_names_the_base_and_how_to_correct(tmp_path: Path) -> None:
    manifest = save_emulator(tmp_path / "e")
    card = (tmp_path / "e" / "README.md").read_text()
    assert "base_model: example/base" in card
    assert f"{manifest.parameters:,} parameters instead of 100" in card
    assert "emloc-tools correct --emulator" in card
    Emulator(tmp_path / "e").close()
