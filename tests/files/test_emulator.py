"""Emulator folders read back, in one file or shards; and damage that golden folders cannot hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from emloc_tools.errors import FormatError
from emloc_tools.files import tensor_file
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.manifest import WeightingRecord
from emloc_tools.files.opening import open_regular
from tests.files.making import SHAPES, factors, save_emulator

INDEX = "model.safetensors.index.json"


def change(path: Path, update: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    update(value)
    path.write_text(json.dumps(value))


def refused(folder: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        Emulator(folder)
    assert str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize("max_shard_size", [1 << 40, 100, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_and_dense_tensors_are_read_as_they_were_written(
    tmp_path: Path, dtype: torch.dtype, max_shard_size: int
) -> None:
    manifest = save_emulator(tmp_path / "e", dtype=dtype, max_shard_size=max_shard_size)
    emulator = Emulator(tmp_path / "e")
    assert emulator.manifest == manifest
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items()):
        for found, expected in zip(emulator.factors(name), factors(seed, rows, columns, 2), strict=True):
            assert torch.equal(found, expected.to(dtype))
    assert torch.equal(emulator.read("embed.weight"), torch.arange(20.0).view(5, 4))
    assert emulator.hash == f"xxh3_128:{xxhash.xxh3_128((tmp_path / 'e' / 'emulator.json').read_bytes()).hexdigest()}"
    emulator.close()


def test_a_weighted_emulator_is_read_with_its_weighting_and_an_unweighted_one_has_none(tmp_path: Path) -> None:
    manifest = save_emulator(tmp_path / "weighted", weighting=WeightingRecord(damping=0.1, sensitivity={}))
    save_emulator(tmp_path / "plain")
    weighted, plain = Emulator(tmp_path / "weighted"), Emulator(tmp_path / "plain")
    assert weighted.manifest == manifest
    assert (weighted.weighting, plain.weighting) == (WeightingRecord(damping=0.1, sensitivity={}), None)
    for ours, theirs in zip(weighted.factors("block.0.up"), plain.factors("block.0.up"), strict=True):
        assert torch.equal(ours, theirs)  # they are used alike
    weighted.close()
    plain.close()


@pytest.mark.parametrize(
    ("update", "rule", "field"),
    [
        (lambda m: m.update(format_version=3), "E2", "format_version"),
        (lambda m: m.pop("weighting"), "E2", "format_version"),
        (lambda m: m.update(format_version=1), "E3", "weighting"),
        (lambda m: m.update(weighting=None), "E3", "weighting"),
        (lambda m: m["weighting"].update(damping=-0.1), "E3", "weighting.damping"),
        (lambda m: m["weighting"].update(damping="0.1"), "E3", "weighting.damping"),
        (lambda m: m["weighting"].update(rank=64), "E3", "weighting.rank"),
        (lambda m: m["weighting"].pop("damping"), "E3", "weighting.damping"),
        (lambda m: m.update(calibration=None), "E3", "calibration"),
    ],
)
def test_a_weighting_that_does_not_fit_its_version_is_refused(
    tmp_path: Path, update: Callable[[Any], object], rule: str, field: str
) -> None:
    save_emulator(tmp_path / "e", weighting=WeightingRecord(damping=0.1, sensitivity={}))
    change(tmp_path / "e" / "emulator.json", update)
    error = refused(tmp_path / "e")
    assert (error.rule, error.field) == (rule, field)


def test_a_configuration_of_another_version_than_the_manifest_is_refused(tmp_path: Path) -> None:
    for name, weighting, other in (("one", None, 2), ("two", WeightingRecord(damping=0.1, sensitivity={}), 1)):
        save_emulator(tmp_path / name, weighting=weighting)
        change(tmp_path / name / "config.json", lambda c, other=other: c["emloc"].update(format_version=other))
        error = refused(tmp_path / name)
        assert (error.rule, error.field) == ("E7", "emloc")


def test_reading_never_runs_the_modeling_file(tmp_path: Path) -> None:
    save_emulator(tmp_path / "e")  # its modeling file ends any program that runs it
    with pytest.raises(SystemExit, match="was executed"):
        exec((tmp_path / "e" / "modeling_emloc.py").read_text())
    Emulator(tmp_path / "e").close()


def test_an_emulator_in_the_hub_s_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0123", tmp_path / "models--x" / "blobs"
    save_emulator(tmp_path / "e")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate((tmp_path / "e").iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    emulator = Emulator(snapshot)
    assert torch.equal(emulator.factors("block.0.up")[0], factors(0, 6, 4, 2)[0])
    emulator.close()


def test_weights_behind_a_link_that_leaves_the_folder_are_refused(tmp_path: Path) -> None:
    save_emulator(tmp_path / "e")
    (tmp_path / "e" / "model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "e" / "model.safetensors").symlink_to("../elsewhere")
    assert refused(tmp_path / "e").rule == "E4"


def test_weights_in_one_file_beside_an_index_are_refused(tmp_path: Path) -> None:
    """transformers takes the file, others take the index."""
    save_emulator(tmp_path / "e", max_shard_size=100)
    save_file({"x": torch.zeros(1)}, tmp_path / "e" / "model.safetensors")
    error = refused(tmp_path / "e")
    assert (error.rule, Path(error.file).name) == ("E4", "model.safetensors")


def test_a_shard_that_holds_more_than_the_index_says_is_refused_before_any_tensor_is_read(tmp_path: Path) -> None:
    save_emulator(tmp_path / "e", max_shard_size=100)
    path = sorted((tmp_path / "e").glob("model-*.safetensors"))[-1]
    save_file({**load_file(path), "smuggled": torch.zeros(1)}, path)
    error = refused(tmp_path / "e")
    assert (error.rule, error.field) == ("E4", "smuggled")


@pytest.mark.parametrize(
    ("update", "rule", "field"),
    [
        (lambda c: c["emloc"].update(format_version=True), "E7", "emloc"),
        (lambda c: c["emloc"].update(format_version=1.0), "E7", "emloc"),
        (lambda c: c["emloc"].update(more=1), "E7", "emloc"),
        (lambda c: c["emloc"]["ranks"].update({"block.0.up": 2.0}), "E7", "emloc"),
        (lambda c: c["emloc"]["ranks"].pop("block.0.up"), "E7", "emloc"),
        (lambda c: c.update(emloc=[1]), "E7", "emloc"),
        (lambda c: c.pop("emloc"), "E7", "emloc"),
        (lambda c: c.pop("architectures"), "E11", "architectures"),
        (lambda c: c.update(architectures="EmlocLlamaForCausalLM"), "E11", "architectures"),
        (lambda c: c.update(architectures=["EmlocLlamaForCausalLM"] * 2), "E11", "architectures"),
        (lambda c: c.pop("auto_map"), "E12", "auto_map"),
        (lambda c: c.update(auto_map=["modeling_emloc.EmlocX"]), "E12", "auto_map"),
        (lambda c: c["auto_map"].update(AutoModel=None), "E12", "auto_map.AutoModel"),
        (lambda c: c["auto_map"].update(AutoModel=["modeling_emloc.EmlocX"]), "E12", "auto_map.AutoModel"),
        (lambda c: c["auto_map"].update(AutoModel="modeling_emloc.LlamaModel"), "E12", "auto_map.AutoModel"),
        (lambda c: c["auto_map"].update(AutoModel="../modeling_emloc.EmlocX"), "E12", "auto_map.AutoModel"),
        (lambda c: c["auto_map"].update(AutoModel="a/b--modeling_emloc.EmlocX"), "E12", "auto_map.AutoModel"),
        (lambda c: c["auto_map"].update(AutoModel="modeling_emloc.EmlocX\n"), "E12", "auto_map.AutoModel"),
        (lambda c: c["auto_map"].update(AutoModel="absent.EmlocX"), "E12", "auto_map.AutoModel"),
        (lambda c: c["auto_map"].update(AutoConfig="modeling_emloc.EmlocX"), "E12", "auto_map.AutoConfig"),
        (lambda c: c["auto_map"].update(AutoTokenizer="modeling_emloc.EmlocX"), "E12", "auto_map.AutoTokenizer"),
        (lambda c: c["auto_map"].update({"": "modeling_emloc.EmlocX"}), "E12", "auto_map."),
        (lambda c: c.update(quantization_config=None), "E13", "quantization_config"),
    ],
)
def test_a_configuration_that_would_mislead_a_loader_is_refused(
    tmp_path: Path, update: Callable[[Any], object], rule: str, field: str
) -> None:
    save_emulator(tmp_path / "e")
    change(tmp_path / "e" / "config.json", update)
    error = refused(tmp_path / "e")
    assert (error.rule, Path(error.file).name, error.field) == (rule, "config.json", field)


def rewritten(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a single-file emulator."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, value in tensors.items():
        stored.pop(name, None)
        if value is not None:
            stored[name] = value
    save_file(stored, path)


@pytest.mark.parametrize(
    ("tensors", "rule", "field"),
    [
        ({"block.0.up.U": None}, "E5", "block.0.up.U"),
        ({"block.0.up.U": torch.zeros(2, 6)}, "E5", "block.0.up.U"),
        ({"block.0.up.S": torch.ones(2, 1)}, "E5", "block.0.up.S"),
        ({"block.0.up.S": torch.ones(2, dtype=torch.float16)}, "E5", "block.0.up"),
        ({f"block.0.up.{f}": v.double() for f, v in zip("US", factors(0, 6, 4, 2), strict=False)}, "E5", "block.0.up"),
        ({"block.0.up.bias": torch.zeros(4)}, "E5", "block.0.up.bias"),
        ({"block.1.up.weight": torch.zeros(1)}, "E8", "block.0.down.weight"),
        ({"block.0.down.weight": torch.zeros(4, 6)}, "E8", "block.0.down.weight"),
        ({"block.0.down.weight": torch.tensor(0.0)}, "E8", "block.0.down.weight"),
        ({"extra": torch.zeros(1)}, "E9", "tensors.extra"),
        ({"embed.weight": None}, "E9", "tensors.embed.weight"),
    ],
)
def test_tensors_that_contradict_the_manifest_are_refused_on_opening(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], rule: str, field: str
) -> None:
    save_emulator(tmp_path / "e")
    rewritten(tmp_path / "e", **tensors)
    error = refused(tmp_path / "e")
    assert (error.rule, error.field) == (rule, field)


def with_hash(folder: Path, name: str, value: torch.Tensor) -> None:
    """Replace a float32 tensor and its hash in the manifest, computed here."""
    rewritten(folder, **{name: value})
    digest = xxhash.xxh3_128(f"F32 {list(value.shape)} ".encode() + value.numpy().tobytes()).hexdigest()
    change(folder / "emulator.json", lambda manifest: manifest["tensors"].update({name: f"xxh3_128:{digest}"}))


@pytest.mark.parametrize(
    ("factor", "value", "field"),
    [
        ("S", [1.0, 2.0], "block.0.up.S"),
        ("S", [1.0, 0.0], "block.0.up.S"),
        ("S", [-1.0, -2.0], "block.0.up.S"),
        ("S", [float("inf"), 1.0], "block.0.up"),
        ("S", [1.0, float("nan")], "block.0.up"),
        ("Vh", [[float("nan")] * 4] * 2, "block.0.up"),
    ],
)
def test_factors_with_impossible_values_are_refused_though_their_hash_is_right(
    tmp_path: Path, factor: str, value: Any, field: str
) -> None:
    save_emulator(tmp_path / "e")
    with_hash(tmp_path / "e", f"block.0.up.{factor}", torch.tensor(value))
    emulator = Emulator(tmp_path / "e")
    with pytest.raises(FormatError) as caught:
        emulator.factors("block.0.up")
    assert (caught.value.rule, caught.value.field) == ("E6", field)
    emulator.close()


def test_equal_entries_of_s_are_sorted_and_columns_of_u_need_not_be_orthonormal(tmp_path: Path) -> None:
    save_emulator(tmp_path / "e")
    with_hash(tmp_path / "e", "block.0.up.S", torch.tensor([2.0, 2.0]))
    with_hash(tmp_path / "e", "block.0.up.U", torch.ones(6, 2))
    emulator = Emulator(tmp_path / "e")
    assert emulator.factors("block.0.up")[1].tolist() == [2, 2]
    emulator.close()


def test_a_changed_value_anywhere_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    save_emulator(tmp_path / "e")
    rewritten(tmp_path / "e", **{"embed.weight": torch.arange(20.0).view(5, 4) + 1})
    emulator = Emulator(tmp_path / "e")
    with pytest.raises(FormatError, match=r"embed\.weight: has another content hash .*E10"):
        emulator.read("embed.weight")
    emulator.factors("block.0.up")  # the others are unharmed
    emulator.close()


def test_refused_folders_leave_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_emulator(tmp_path / "e", max_shard_size=1)
    change(tmp_path / "e" / "emulator.json", lambda manifest: manifest.update(parameters=7))
    files: list[BinaryIO] = []

    def recording(path: Path, rule: str) -> BinaryIO:
        files.append(open_regular(path, rule))
        return files[-1]

    monkeypatch.setattr(tensor_file, "open_regular", recording)
    assert refused(tmp_path / "e").rule == "E14"
    assert len(files) == len(list((tmp_path / "e").glob("*.safetensors")))
    assert all(file.closed for file in files)
