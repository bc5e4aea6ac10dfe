"""Safetensors files: a lazy reader into caller-owned memory and a sharded writer that fills planned files in any order.

The safetensors library maps files into memory, and touched pages then count as ours and grow with the model's depth;
its writer wants all tensors at once. Stages here hold one unit of a model at a time, so both are written anew
on the format's own definition: 8 bytes of header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
import xxhash

from emloc_tools.errors import FormatError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_SIZE = 5_000_000_000  # bytes; what the Hub recommends for one file
MAX_HEADER = 100_000_000  # the format's own limit, in bytes
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def content_hash(tensor: torch.Tensor) -> str:
    """A tensor's identity: `xxh3_128:` and 32 hex digits over its dtype, shape and little-endian bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode())
    digest.update(as_bytes(tensor))
    return f"xxh3_128:{digest.hexdigest()}"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """One safetensors file: its checked header, and its tensors read one at a time.

    `rule` is the number that a `FormatError` names when the file is not valid safetensors.
    """

    def __init__(self, path: Path, rule: str = "safetensors") -> None:
        self.path, self.rule = path, rule
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115, PTH123 - kept open; raw for readinto
        except OSError as error:
            raise self._error("", f"cannot be read: {error.strerror or error}") from error
        try:
            self.metadata, self._entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def specs(self) -> dict[str, TensorSpec]:
        """All tensors of the file by name, in header order."""
        return {name: spec for name, (spec, _) in self._entries.items()}

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor `name`, in `buffer` (1-D uint8, at least its bytes, suitably aligned) or in new memory."""
        spec, start = self._entries[name]
        if buffer is None:
            buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
        view = memoryview(buffer[: spec.nbytes].numpy())
        self._file.seek(start)
        done = 0
        while done < spec.nbytes:
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise self._error(name, f"ends after {done} of {spec.nbytes} bytes; the file was truncated")
            done += count
        return buffer[: spec.nbytes].view(spec.dtype).view(spec.shape)

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _read_header(self) -> tuple[dict[str, str], dict[str, tuple[TensorSpec, int]]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER, size - 8):
            raise self._error("header", f"gives its length as {length} bytes in a file of {size}")
        try:
            header = json.loads(self._file.read(length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._error("header", f"is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._error("header", "is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("__metadata__", "must map strings to strings")
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, (spec, start) in sorted(entries.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
            if start != end:
                raise self._error(name, f"starts at byte {start}, expected {end}: tensors overlap or leave a hole")
            end = start + spec.nbytes
        if end != size:
            what = "was truncated" if size < end else "holds bytes that belong to no tensor"
            raise self._error("", f"is {size} bytes long but its header describes {end}; the file {what}")
        return metadata, entries

    def _entry(self, name: str, value: Any, data_start: int) -> tuple[TensorSpec, int]:
        try:
            dtype, shape, (start, end) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(name, "needs a known dtype, a shape and two data_offsets") from error
        if not _whole_numbers([*shape, start, end] if isinstance(shape, list) else [None]):
            raise self._error(name, "has a shape or offsets that are not whole numbers >= 0")
        spec = TensorSpec(name, dtype, tuple(shape))
        if end - start != spec.nbytes:
            raise self._error(name, f"spans {end - start} bytes; {value['dtype']} {shape} needs {spec.nbytes}")
        return spec, data_start + start

    def _error(self, field: str, message: str) -> FormatError:
        return FormatError(self.rule, self.path, field, message)


class TensorFolder:
    """The tensors of one or several safetensors files, opened when first needed and read one at a time.

    `weight_map` maps each tensor to its file's name, `locate` turns that name into a path (it may download it).
    `bytes_read` counts what was read since the start.
    """

    def __init__(self, weight_map: Mapping[str, str], locate: Callable[[str], Path], rule: str = "safetensors") -> None:
        self.weight_map, self._locate, self._rule = dict(weight_map), locate, rule
        self._files: dict[str, TensorFile] = {}
        self.bytes_read = 0

    @classmethod
    def of_files(cls, paths: Iterable[Path], rule: str = "safetensors") -> TensorFolder:
        """Every tensor of the given files; a tensor in two of them is an error."""
        by_name = {path.name: path for path in paths}
        folder = cls({}, by_name.__getitem__, rule)
        for name, path in by_name.items():
            folder._files[name] = TensorFile(path, rule)
            for tensor in folder._files[name].specs():
                if tensor in folder.weight_map:
                    raise FormatError(rule, path, tensor, f"is also in {folder.weight_map[tensor]}")
                folder.weight_map[tensor] = name
        return folder

    @classmethod
    def of_model(
        cls, locate: Callable[[str], Path | None], stem: str = "model", rule: str = "safetensors"
    ) -> TensorFolder:
        """A Hugging Face checkpoint: `<stem>.safetensors.index.json` and its shards, else `<stem>.safetensors`.

        `locate` returns None for a file that does not exist.
        """
        index_path = locate(f"{stem}.safetensors.index.json")
        if index_path is not None:
            return cls(_read_index(index_path, rule), _must_exist(locate, index_path, rule), rule)
        path = locate(f"{stem}.safetensors")
        if path is None:
            raise FormatError(rule, f"{stem}.safetensors", "", "does not exist, nor does an index of shards")
        return cls.of_files([path], rule)

    def __contains__(self, name: object) -> bool:
        return name in self.weight_map

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.weight_map)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from its file's header."""
        return self._open(name).specs()[name]

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor `name`; see `TensorFile.read`."""
        tensor = self._open(name).read(name, buffer)
        self.bytes_read += tensor.nbytes
        return tensor

    def metadata_of(self, file_name: str) -> dict[str, str]:
        """The `__metadata__` of one of the files, which must be open."""
        return self._files[file_name].metadata

    def close(self) -> None:
        """Release all files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, tensor: str) -> TensorFile:
        name = self.weight_map[tensor]
        if name not in self._files:
            file = TensorFile(self._locate(name), self._rule)
            absent = [t for t, f in self.weight_map.items() if f == name and t not in file.specs()]
            if absent:
                file.close()
                raise FormatError(self._rule, file.path, absent[0], "is missing, although the index places it here")
            self._files[name] = file
        return self._files[name]


class ShardedWriter:
    """Write known tensors into one or several safetensors files, one at a time and in any order.

    Every file is laid out beforehand from `specs`; `write` puts a tensor where it belongs. `finish` refuses to close
    an incomplete set. One file is called `<stem>.safetensors`, several `<stem>-00001-of-00003.safetensors`.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        specs: Sequence[TensorSpec],
        *,
        max_shard_size: int,
        metadata: Mapping[str, str] | None = None,
        always_number: bool = False,
    ) -> None:
        shards = plan_shards(specs, max_shard_size)
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, tuple[str, int, TensorSpec]] = {}
        self._pending = {spec.name for spec in specs}
        self.hashes: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            single = len(shards) == 1 and not always_number
            name = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            header, starts = _layout(shard, metadata or {})
            file = open(folder / name, "xb", buffering=0)  # noqa: SIM115, PTH123 - closed by finish or abandon
            self._files[name] = file
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in shard))
            self._places.update({spec.name: (name, len(header) + starts[spec.name], spec) for spec in shard})

    @property
    def weight_map(self) -> dict[str, str]:
        """Which file holds which tensor, sorted by tensor."""
        return {tensor: self._places[tensor][0] for tensor in sorted(self._places)}

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for *_, spec in self._places.values())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put `tensor` in its place; it must have the planned dtype and shape, and come once."""
        file_name, start, spec = self._places[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape) or name not in self._pending:
            raise ValueError(f"{name}: planned {spec}, got {tensor.dtype} {tuple(tensor.shape)}, or written twice")
        tensor = tensor.detach().cpu().contiguous()
        self.hashes[name] = content_hash(tensor)
        view, file = as_bytes(tensor), self._files[file_name]
        file.seek(start)
        while view:
            view = view[file.write(view) :]
        self._pending.discard(name)

    def finish(self) -> list[str]:
        """Force everything to disk, close, and return the file names."""
        if self._pending:
            raise ValueError(f"{len(self._pending)} planned tensors were never written, e.g. {min(self._pending)}")
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        return list(self._files)

    def close(self) -> None:
        """Close without finishing; the files are incomplete."""
        for file in self._files.values():
            file.close()


def plan_shards(specs: Sequence[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Group tensors in order into shards of at most `max_shard_size` bytes; a larger tensor gets its own shard."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def read_json(path: Path, rule: str, what: str = "") -> dict[str, Any]:
    """A JSON object from a file; anything else is a `FormatError` of `rule`."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise FormatError(rule, path, what, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(rule, path, what, f"is not valid JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(rule, path, what, "must be a JSON object")
    return value


def _layout(shard: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of one file and each tensor's start after it. Wide dtypes come first, so all are aligned."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for spec in sorted(shard, key=lambda spec: -spec.dtype.itemsize):
        starts[spec.name] = end
        offsets = [end, end + spec.nbytes]
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _read_index(path: Path, rule: str) -> dict[str, str]:
    weight_map = read_json(path, rule).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(rule, path, "weight_map", "must map tensor names to file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise FormatError(rule, path, f"weight_map.{tensor}", f"{name!r} is not a plain *.safetensors file name")
    return weight_map


def _must_exist(locate: Callable[[str], Path | None], index: Path, rule: str) -> Callable[[str], Path]:
    def find(name: str) -> Path:
        path = locate(name)
        if path is None:
            raise FormatError(rule, index, "weight_map", f"names {name}, which does not exist")
        return path

    return find


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _whole_numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
