"""Calibration folders: packing, spooling, writing and reading back, and damage that golden folders cannot hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emloc_tools.errors import FormatError
from emloc_tools.files.calibration import Calibration, GramSpool
from emloc_tools.files.packing import pack_lower, packed_diagonal, unpack_lower
from emloc_tools.records import Gram
from tests.files.making import gram, save_calibration


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_packing_keeps_the_lower_triangle_row_by_row_and_unpacking_restores_the_matrix(n: int, seed: int) -> None:
    G = gram(n, seed=seed)
    packed = pack_lower(G)
    assert np.array_equal(packed.numpy(), G.numpy()[np.tril_indices(n)])
    assert all(packed[i * (i + 1) // 2 + j] == G[i, j] for i in range(n) for j in range(i + 1))
    assert torch.equal(unpack_lower(packed, n), G)
    assert torch.equal(packed_diagonal(packed, n), G.diagonal())


def test_a_spool_adds_what_comes_in_parts_and_leaves_nothing(tmp_path: Path) -> None:
    spool = GramSpool(tmp_path / "spool")
    spool.add(("a", "b"), Gram(gram(3, seed=1), "input", 10))
    spool.add(("c",), Gram(gram(2, seed=2), "output", 5))
    spool.add(("a", "b"), Gram(gram(3, seed=3), "input", 7))
    assert torch.equal(unpack_lower(spool.read(("a", "b")), 3), gram(3, seed=1) + gram(3, seed=3))
    assert torch.equal(unpack_lower(spool.read(("c",)), 2), gram(2, seed=2))
    assert [(entry.side, entry.features, entry.tokens) for entry in spool.entries.values()] == [
        ("input", 3, 17),
        ("output", 2, 5),
    ]
    spool.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("max_shard_size", "shards"), [(1 << 40, 1), (1, 2)])
def test_what_is_written_is_read_back_with_side_tokens_and_sharing(
    tmp_path: Path, max_shard_size: int, shards: int
) -> None:
    manifest = save_calibration(tmp_path / "c", max_shard_size=max_shard_size)
    calibration = Calibration(tmp_path / "c")
    assert len(calibration.manifest.shards) == shards
    assert calibration.manifest == manifest
    for layer, (features, side, tokens) in {
        "block.0.up": (4, "input", 10),
        "block.1.up": (4, "input", 10),
        "block.0.down": (4, "output", 9),
    }.items():
        found = calibration.gram(layer)
        assert torch.equal(found.matrix, gram(features, seed=tokens))
        assert (found.side, found.tokens) == (side, tokens)
    assert calibration.record("block.0.up") is calibration.record("block.1.up")
    calibration.close()


def test_the_library_reads_the_shards(tmp_path: Path) -> None:
    save_calibration(tmp_path / "c", max_shard_size=1)
    stored: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / "c").glob("*.safetensors")):
        stored |= load_file(path)
    i, j = torch.tril_indices(4, 4)
    assert {name: value.tolist() for name, value in stored.items()} == {
        "block.0.up.input_gram": gram(4, seed=10)[i, j].tolist(),
        "block.0.down.output_gram": gram(4, seed=9)[i, j].tolist(),
    }


def test_the_hash_is_that_of_the_manifest_s_bytes(tmp_path: Path) -> None:
    save_calibration(tmp_path / "c")
    path = tmp_path / "c" / "calibration.json"
    calibration = Calibration(tmp_path / "c")
    calibration.close()
    assert calibration.hash == f"xxh3_128:{xxhash.xxh3_128(path.read_bytes()).hexdigest()}"
    path.unlink()  # the hash is of what was read; it does not look again
    assert calibration.hash.startswith("xxh3_128:")


def test_a_shard_that_another_program_wrote_again_is_accepted(tmp_path: Path) -> None:
    """Header order and metadata are free; only names, dtypes, shapes and values count."""
    save_calibration(tmp_path / "c")
    path = next((tmp_path / "c").glob("*.safetensors"))
    tensors = load_file(path)
    before = path.read_bytes()
    save_file(dict(reversed(tensors.items())), path, metadata={"rewritten": "yes"})
    assert path.read_bytes() != before
    calibration = Calibration(tmp_path / "c")
    assert torch.equal(calibration.gram("block.0.down").matrix, gram(4, seed=9))
    calibration.close()


def change(folder: Path, **fields: object) -> None:
    path = folder / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("kind", ["folder", "pipe", "link outside", "link to nothing", "absent"])
def test_a_shard_that_is_no_file_of_the_folder_is_refused(tmp_path: Path, kind: str) -> None:
    save_calibration(tmp_path / "c")
    path = next((tmp_path / "c").glob("*.safetensors"))
    path.rename(tmp_path / "moved")
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link outside":
            path.symlink_to(tmp_path / "moved")
        case "link to nothing":
            path.symlink_to("nothing")
    with pytest.raises(FormatError) as caught:
        Calibration(tmp_path / "c")
    assert caught.value.rule == "C4"
    assert path.name in str(caught.value)


def test_a_shard_named_twice_and_a_tensor_in_two_shards_are_refused(tmp_path: Path) -> None:
    save_calibration(tmp_path / "c")
    path = next((tmp_path / "c").glob("*.safetensors"))
    change(tmp_path / "c", shards=[path.name, path.name])
    with pytest.raises(FormatError, match=r"is named twice \(format rule C4\)"):
        Calibration(tmp_path / "c")
    (path.parent / "copy.safetensors").write_bytes(path.read_bytes())
    change(tmp_path / "c", shards=[path.name, "copy.safetensors"])
    with pytest.raises(FormatError, match=rf"is also in {path.name} \(format rule C4\)"):
        Calibration(tmp_path / "c")


def test_claims_of_a_huge_layer_cost_nothing(tmp_path: Path) -> None:
    save_calibration(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "calibration.json").read_text())
    for record in manifest["grams"]:
        record["features"] = 2**53 - 1
    change(tmp_path / "c", grams=manifest["grams"])
    with pytest.raises(FormatError, match=r"must be a float32 tensor of shape \[\d+\] \(format rule C5\)"):
        Calibration(tmp_path / "c")


def test_a_manifest_that_names_things_a_hundred_thousand_times_is_refused_at_once(tmp_path: Path) -> None:
    """Counting with `list.count` would take minutes here."""
    save_calibration(tmp_path / "c")
    change(tmp_path / "c", unreached=[f"layer.{index}" for index in range(100_000)] * 2)
    with pytest.raises(FormatError, match=r"named twice.*C10"):
        Calibration(tmp_path / "c")


@pytest.mark.parametrize(
    ("values", "rule"), [([float("nan")], "C9"), ([float("inf")], "C9"), ([-1.0], "C9"), ([2.0], "C8")]
)
def test_damaged_values_are_refused_even_with_a_right_hash(tmp_path: Path, values: list[float], rule: str) -> None:
    manifest = save_calibration(tmp_path / "c")
    path = next((tmp_path / "c").glob("*.safetensors"))
    tensors = load_file(path)
    record = manifest.grams[0]
    tensors[record.tensor][:1] = torch.tensor(values)
    save_file(tensors, path)
    if rule == "C9":
        raw = b"F32 [10] " + tensors[record.tensor].numpy().tobytes()
        right = f"xxh3_128:{xxhash.xxh3_128(raw).hexdigest()}"
        path = tmp_path / "c" / "calibration.json"
        path.write_text(path.read_text().replace(record.hash, right))
    calibration = Calibration(tmp_path / "c")
    with pytest.raises(FormatError) as caught:
        calibration.gram(record.layers[0])
    assert (caught.value.rule, caught.value.field) == (rule, record.tensor)
    calibration.close()


def test_a_file_without_a_folder_and_an_absent_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "absent"):
        with pytest.raises(FormatError, match=r"calibration\.json: does not exist \(format rule C1\)"):
            Calibration(tmp_path / name)
