"""Several files as one checkpoint, and the sharded writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emloc_tools.errors import FormatError
from emloc_tools.files.tensors import DTYPES, ShardedWriter, TensorFolder, TensorSpec, content_hash, plan_shards
from tests.files.literal import put, safetensors, tensor

INDEX = "model.safetensors.index.json"


def locate_in(folder: Path) -> Any:
    return lambda name: folder / name if (folder / name).is_file() else None


def spec(name: str, value: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, value.dtype, tuple(value.shape))


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> ShardedWriter:
    """Write tensors, the last first: the order of writing must not matter."""
    specs = [spec(name, value) for name, value in tensors.items()]
    writer = ShardedWriter(folder, "model", specs, **{"max_shard_size": 1 << 40, **options})
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.finish()
    return writer


def some_tensors() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, of odd sizes such that alignment matters."""
    sizes = range(1, len(DTYPES) + 1)
    made = {}
    for size, (name, dtype) in zip(sizes, DTYPES.items(), strict=True):
        made[name.lower()] = (torch.arange(size * dtype.itemsize, dtype=torch.uint8) % 2).view(dtype)
    return {"flag": torch.tensor(True), **made, "none": torch.empty(0, 3)}


def raw(value: torch.Tensor) -> bytes:
    return bytes(value.contiguous().reshape(-1).view(torch.uint8))


def test_a_single_file_is_read_by_the_library_and_by_us_byte_for_byte(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, metadata={"format": "pt"})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    theirs = load_file(tmp_path / "model.safetensors")
    with TensorFolder.of_model(locate_in(tmp_path)) as ours:
        assert set(theirs) == set(tensors) == set(ours.names())
        for name, value in tensors.items():
            for read in (theirs[name], ours.read(name)):
                assert (read.dtype, read.shape, raw(read)) == (value.dtype, value.shape, raw(value))


def test_shards_hold_each_tensor_once_and_the_library_reads_every_one(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.full((index + 1,), float(index)) for index in range(7)}
    writer = write(tmp_path, tensors, max_shard_size=40)
    assert sorted({*writer.weight_map.values()}) == sorted(path.name for path in tmp_path.iterdir())
    assert writer.total_size == 4 * sum(range(1, 8))
    merged: dict[str, torch.Tensor] = {}
    for path in sorted(tmp_path.iterdir()):
        shard = load_file(path)
        assert not merged.keys() & shard.keys()
        assert all(writer.weight_map[name] == path.name for name in shard)
        assert sum(value.nbytes for value in shard.values()) <= 40 or len(shard) == 1
        merged |= shard
    assert {name: value.tolist() for name, value in merged.items()} == {n: v.tolist() for n, v in tensors.items()}


def test_shards_are_filled_in_order_and_a_larger_tensor_gets_its_own() -> None:
    specs = [TensorSpec(name, torch.uint8, (size,)) for name, size in zip("abcdef", (4, 5, 30, 1, 9, 1), strict=True)]
    names = [[spec.name for spec in shard] for shard in plan_shards(specs, 10)]
    assert names == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    starts = {name: 8 + length + header[name]["data_offsets"][0] for name in tensors}
    assert all(start % tensors[name].dtype.itemsize == 0 for name, start in starts.items())
    # Control: laid out in the given order they would not be.
    naive, misaligned = 0, 0
    for value in tensors.values():
        misaligned += naive % value.dtype.itemsize != 0
        naive += value.nbytes
    assert misaligned > 0


def test_equal_contents_give_equal_bytes_whatever_the_order_of_writing(tmp_path: Path) -> None:
    tensors = some_tensors()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "one", tensors, metadata={"b": "1", "a": "2"})
    writer = ShardedWriter(
        tmp_path / "two",
        "model",
        [spec(name, value) for name, value in tensors.items()],
        max_shard_size=1 << 40,
        metadata={"a": "2", "b": "1"},
    )
    for name, value in tensors.items():
        writer.write(name, value)
    writer.finish()
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_the_writer_keeps_the_hash_of_what_it_wrote_also_of_a_view(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    writer = write(tmp_path, {"view": matrix.T[1:]})
    stored = load_file(tmp_path / "model.safetensors")["view"]
    assert stored.tolist() == matrix.T[1:].tolist()
    assert writer.hashes["view"] == content_hash(stored)


def test_the_writer_refuses_what_was_not_planned_and_an_incomplete_set(tmp_path: Path) -> None:
    specs = [TensorSpec("a", torch.float32, (2,)), TensorSpec("b", torch.float32, (1,))]
    writer = ShardedWriter(tmp_path, "model", specs, max_shard_size=100)
    with pytest.raises(ValueError, match="planned"):
        writer.write("a", torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="planned"):
        writer.write("a", torch.zeros(1, 2))
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="written twice"):
        writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match=r"1 planned tensors were never written, e\.g\. b"):
        writer.finish()
    writer.close()


def test_the_writer_never_writes_over_a_file(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(FileExistsError):
        ShardedWriter(tmp_path, "model", [TensorSpec("a", torch.float32, (2,))], max_shard_size=100)
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1, 1]


def two_shards(folder: Path, index: Any) -> Path:
    """Shards x (a) and y (b), and an index."""
    put(folder, "x.safetensors", safetensors({"a": tensor("U8", [1], 0, 1)}, b"\x01"))
    put(folder, "y.safetensors", safetensors({"b": tensor("U8", [1], 0, 1)}, b"\x02"))
    return put(folder, INDEX, index if isinstance(index, bytes) else json.dumps(index).encode())


RIGHT = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}


def test_an_index_leads_to_every_tensor_and_bytes_are_counted(tmp_path: Path) -> None:
    two_shards(tmp_path, RIGHT)
    with TensorFolder.of_model(locate_in(tmp_path)) as folder:
        folder.check_placement()
        assert [folder.read(name).item() for name in folder.names()] == [1, 2]
        assert folder.bytes_read == 2


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["x.safetensors"]}',
        b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": None}},
        {"weight_map": {"a": ["x.safetensors"]}},
        *(
            {"weight_map": {"a": name}}
            for name in (
                "../x.safetensors",
                "/x.safetensors",
                "inner/x.safetensors",
                "..\\x.safetensors",
                "C:x.safetensors",
                "..safetensors",
                ".safetensors",
                ".hidden.safetensors",
                "x.safetensors\n",
                "x.safetensors\0",
                "x.bin",
                "",
                "x" * 300 + ".safetensors",
                "~x.safetensors",
                "ｘ.safetensors",
            )
        ),
    ],
)
def test_an_index_that_is_wrong_or_leaves_the_folder_is_refused(tmp_path: Path, index: Any) -> None:
    path = two_shards(tmp_path, index)
    with pytest.raises(FormatError) as caught:
        TensorFolder.of_model(locate_in(tmp_path), rule="E4")
    assert (caught.value.rule, caught.value.file) == ("E4", str(path))
    assert str(caught.value).isprintable()


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    cases = {
        "is missing, although the index places it here": {"a": "x.safetensors", "c": "x.safetensors"},
        "is here, although the index does not say so": {"a": "x.safetensors", "b": "y.safetensors"},
        "which does not exist": {"a": "z.safetensors"},
    }
    for message, weight_map in cases.items():
        two_shards(tmp_path, {"weight_map": weight_map})
        both = {"b": tensor("U8", [1], 0, 1), "a": tensor("U8", [1], 1, 2)}
        put(tmp_path, "y.safetensors", safetensors(both, b"\x02\x03"))
        with TensorFolder.of_model(locate_in(tmp_path)) as folder, pytest.raises(FormatError, match=message):
            folder.check_placement()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"a: is also in x.safetensors \(format rule C4\)"):
        TensorFolder.of_files([tmp_path / "x.safetensors", tmp_path / "y.safetensors"], rule="C4")


def test_a_shard_that_vanishes_after_the_index_was_read_is_refused(tmp_path: Path) -> None:
    two_shards(tmp_path, RIGHT)
    with TensorFolder.of_model(locate_in(tmp_path), rule="E4") as folder:
        (tmp_path / "y.safetensors").unlink()
        assert folder.read("a").item() == 1
        with pytest.raises(FormatError, match=r"names y.safetensors, which does not exist \(format rule E4\)"):
            folder.read("b")


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist, nor does an index of shards"):
        TensorFolder.of_model(locate_in(tmp_path))
