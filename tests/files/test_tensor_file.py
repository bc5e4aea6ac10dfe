"""One safetensors file: what the library writes is read, and whatever is wrong gives one FormatError."""

from __future__ import annotations

import math
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from emloc_tools.errors import FormatError
from emloc_tools.files.tensor_file import DTYPES, TensorFile, TensorSpec, content_hash
from tests.files.literal import put, safetensors, tensor

SHAPES = [(), (1,), (3,), (2, 3), (0,), (4, 0, 2), (2, 1, 3, 1)]
GOOD = {"a": tensor("F32", [2], 0, 8), "b": tensor("BF16", [1, 2], 8, 12)}
DATA = struct.pack("<2f", 1.5, -2.0) + b"\x80\x3f\x00\x40"  # bfloat16 1.0 and 2.0


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of the given dtype whose bytes are 0 or 1, valid in every dtype."""
    count = math.prod(shape) * dtype.itemsize
    return (torch.arange(count, dtype=torch.uint8) % 2).view(dtype).view(shape)


def test_literal_bytes_are_read_as_the_numbers_they_mean(tmp_path: Path) -> None:
    file = TensorFile(put(tmp_path, "x.safetensors", safetensors({"__metadata__": {"k": "v"}, **GOOD}, DATA)))
    assert file.metadata == {"k": "v"}
    assert file.specs() == {
        "a": TensorSpec("a", torch.float32, (2,)),
        "b": TensorSpec("b", torch.bfloat16, (1, 2)),
    }
    assert file.read("a").tolist() == [1.5, -2.0]
    assert file.read("b").tolist() == [[1.0, 2.0]]
    file.close()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_that_the_library_writes_is_read_byte_for_byte(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    tensors = {f"t{index}": sample(dtype, shape) for index, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert set(file.specs()) == set(tensors)
    for key, expected in tensors.items():
        found = file.read(key)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bytes(found.reshape(-1).view(torch.uint8)) == bytes(expected.reshape(-1).view(torch.uint8))
    file.close()


def test_a_tensor_is_read_into_the_memory_of_the_caller(tmp_path: Path) -> None:
    file = TensorFile(put(tmp_path, "x.safetensors", safetensors(GOOD, DATA)))
    buffer = torch.full((32,), 255, dtype=torch.uint8)
    found = file.read("a", buffer)
    assert found.data_ptr() == buffer.data_ptr()
    assert bytes(buffer[:8]) == DATA[:8]
    assert (buffer[8:] == 255).all()
    file.close()


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
MODERATELY_DEEP = b'{"a":' + b"[" * 80 + b"]" * 80 + b"}"
HOSTILE = {
    "empty file": b"",
    "seven bytes": b"\x01" * 7,
    "header of length zero": safetensors(b"", b"\0" * 8),
    "header length beyond the file": safetensors(GOOD, DATA, length=10_000),
    "header length of 2**64 - 1": safetensors(GOOD, DATA, length=2**64 - 1),
    "header length of 2**63": safetensors(GOOD, DATA, length=2**63),
    "header cut short": safetensors(GOOD, DATA, length=20),
    "header is an array": safetensors(b"[]"),
    "header is a number": safetensors(b"1       "),
    "header begins with a space": safetensors(b" {}     "),
    "header is null bytes": safetensors(b"\0" * 64),
    "header is not UTF-8": safetensors(b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
    "header has a byte order mark": safetensors(b"\xef\xbb\xbf{}"),
    "header is UTF-16": safetensors("{}".encode("utf-16")),
    "header is deep": safetensors(DEEP),
    "header is deeper than the format allows": safetensors(MODERATELY_DEEP),
    "duplicate tensor": safetensors(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"12",
    ),
    "duplicate key inside a tensor": safetensors(
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"
    ),
    "half a surrogate pair in a name": safetensors(
        b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"
    ),
    "NaN in a shape": safetensors(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1"),
    "metadata is a list": safetensors({"__metadata__": []}),
    "metadata is null": safetensors({"__metadata__": None}),
    "metadata holds a number": safetensors({"__metadata__": {"format": 1}}),
    "tensor is a list": safetensors({"a": ["U8", [1], [0, 1]]}, b"1"),
    "tensor is null": safetensors({"a": None}),
    "dtype is missing": safetensors({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"),
    "dtype is unknown": safetensors({"a": tensor("F5", [1], 0, 1)}, b"1"),
    "dtype is lower case": safetensors({"a": tensor("u8", [1], 0, 1)}, b"1"),
    "dtype is unhashable": safetensors({"a": tensor(["U8"], [1], 0, 1)}, b"1"),
    "shape is a number": safetensors({"a": tensor("U8", 1, 0, 1)}, b"1"),
    "shape is text": safetensors({"a": tensor("U8", "1", 0, 1)}, b"1"),
    "shape is an object": safetensors({"a": tensor("U8", {"1": 1}, 0, 1)}, b"1"),
    "shape is nested": safetensors({"a": tensor("U8", [[1]], 0, 1)}, b"1"),
    "side is negative": safetensors({"a": tensor("U8", [-1, -1], 0, 1)}, b"1"),
    "side is a fraction": safetensors({"a": tensor("U8", [1.0], 0, 1)}, b"1"),
    "side is true": safetensors({"a": tensor("U8", [True], 0, 1)}, b"1"),
    "side is null": safetensors({"a": tensor("U8", [None], 0, 1)}, b"1"),
    "offsets are missing": safetensors({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "offsets are three": safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"),
    "offsets are text": safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": "01"}}, b"1"),
    "offset is negative": safetensors({"a": tensor("U8", [1], -1, 0)}, b"1"),
    "offset is true": safetensors({"a": tensor("U8", [1], False, True)}, b"1"),
    "offset is a fraction": safetensors({"a": tensor("U8", [1], 0.0, 1.0)}, b"1"),
    "offsets are reversed": safetensors({"a": tensor("U8", [1], 1, 0)}, b"1"),
    "offsets lie past the end": safetensors({"a": tensor("U8", [1], 1000, 1001)}, b"1"),
    "offsets lie inside the header": safetensors({"a": tensor("U8", [1], -20, -19)}, b"1"),
    "offsets disagree with the shape": safetensors({"a": tensor("F32", [2], 0, 4)}, b"1234"),
    "product of the shape overflows 64 bits": safetensors({"a": tensor("U8", [2**33, 2**33], 0, 2**66)}, b"1"),
    "product wraps around to one byte": safetensors({"a": tensor("U8", [2**64 + 1], 0, 1)}, b"1"),
    "terabytes are claimed": safetensors({"a": tensor("U8", [2**40], 0, 2**40)}, b"1"),
    "side beyond any integer, beside a zero": safetensors({"a": tensor("U8", [0, 10**30], 0, 0)}),
    "sides of nothing whose product overflows": safetensors({"a": tensor("U8", [0, 2**40, 2**40], 0, 0)}),
    "a thousand dimensions": safetensors({"a": tensor("U8", [1] * 1000, 0, 1)}, b"1"),
    "a number of ten thousand digits": safetensors(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}', b"1"
    ),
    "two tensors overlap": safetensors({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, b"123"),
    "two tensors are the same bytes": safetensors({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 0, 2)}, b"12"),
    "a hole before the first": safetensors({"a": tensor("U8", [1], 1, 2)}, b"12"),
    "a hole between": safetensors({"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 2, 3)}, b"123"),
    "bytes after the last": safetensors({"a": tensor("U8", [1], 0, 1)}, b"12"),
    "bytes without any tensor": safetensors({}, b"1"),
    "data cut short": safetensors(GOOD, DATA[:-1]),
    "an empty tensor inside another": safetensors({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [0], 1, 1)}, b"12"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_gives_one_line_and_no_memory_for_its_claims(tmp_path: Path, what: str) -> None:
    path = put(tmp_path, "x.safetensors", HOSTILE[what])
    tracemalloc.start()
    with pytest.raises(FormatError) as caught:
        TensorFile(path, "C4")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 + 60 * len(HOSTILE[what])
    assert caught.value.rule == "C4"
    assert caught.value.file == str(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()


def test_a_sparse_file_with_a_huge_header_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = put(tmp_path, "x.safetensors", safetensors(b"{", length=200_000_000))
    os.truncate(path, 300_000_000)
    tracemalloc.start()
    with pytest.raises(FormatError, match="gives its length as 200000000 bytes"):
        TensorFile(path)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_names_with_line_breaks_escapes_and_great_length_stay_on_one_short_line(tmp_path: Path) -> None:
    name = "a\n\x1b[31m\u2028" + "b" * 10_000
    path = put(tmp_path, "x.safetensors", safetensors({name: tensor("F5", [1], 0, 1)}, b"1"))
    with pytest.raises(FormatError) as caught:
        TensorFile(path)
    assert caught.value.field == name
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_a_folder_a_pipe_and_a_device_are_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, message in (("folder", "directory"), ("pipe", "not a regular file"), ("device", "not a regular file")):
        with pytest.raises(FormatError, match=message):
            TensorFile(tmp_path / name, "C4")
    with pytest.raises(FormatError, match="No such file"):
        TensorFile(tmp_path / "absent", "C4")
    with pytest.raises(FormatError, match="cannot be read"):
        TensorFile(tmp_path / ("x" * 5000), "C4")


def test_a_file_that_shrinks_after_it_was_opened_is_called_truncated(tmp_path: Path) -> None:
    path = put(tmp_path, "x.safetensors", safetensors(GOOD, DATA))
    file = TensorFile(path, "E4")
    os.truncate(path, path.stat().st_size - 6)
    with pytest.raises(FormatError, match=r"a: ends after 6 of 8 bytes; the file was truncated \(format rule E4\)"):
        file.read("a")
    file.close()


def test_the_content_hash_covers_dtype_shape_and_bytes_as_specified() -> None:
    numbers = struct.pack("<6f", *range(6))
    expected = xxhash.xxh3_128(b"F32 [2, 3] " + numbers).hexdigest()
    assert content_hash(torch.arange(6.0).view(2, 3)) == f"xxh3_128:{expected}"
    assert (
        content_hash(torch.tensor(1.5))
        == f"xxh3_128:{xxhash.xxh3_128(b'F32 [] ' + struct.pack('<f', 1.5)).hexdigest()}"
    )
    halves = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert content_hash(halves) == f"xxh3_128:{xxhash.xxh3_128(b'BF16 [2] ' + bytes.fromhex('803f00c0')).hexdigest()}"


def test_the_content_hash_tells_dtype_shape_order_and_values_apart() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    variants = [matrix, matrix.view(3, 2), matrix.view(6), matrix.view(torch.int32), matrix + 1, matrix.T]
    assert len({content_hash(variant) for variant in variants}) == len(variants)
    assert content_hash(matrix.T.contiguous().T) == content_hash(matrix)  # the layout in memory does not count


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = put(tmp_path_factory.getbasetemp(), "random.safetensors", data)
    try:
        file = TensorFile(path)
    except FormatError:
        return
    for name in file.specs():
        file.read(name)
    file.close()


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_a_mutated_header_is_refused_or_describes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    original = bytearray(safetensors({"__metadata__": {"k": "v"}, **GOOD}, DATA))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(original) - len(DATA) - 1))
        original[position] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789-.[]{},":')))
    path = put(tmp_path_factory.getbasetemp(), "mutated.safetensors", bytes(original))
    try:
        file = TensorFile(path)
    except FormatError:
        return
    found = sorted(
        (file.specs()[name].nbytes, bytes(file.read(name).reshape(-1).view(torch.uint8))) for name in file.specs()
    )
    assert b"".join(content for _, content in found) in (DATA, DATA[8:] + DATA[:8])
    file.close()
