"""Several safetensors files as one set of tensors, and a sharded writer that fills planned files in any order.

The safetensors library's writer wants all tensors at once. Stages here hold one unit of a model at a time, so files are
laid out beforehand from names, dtypes and shapes alone. (For reading see `tensor_file`.)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from emloc_tools.errors import FormatError
from emloc_tools.files.json_files import read_json
from emloc_tools.files.tensor_file import DTYPE_NAMES, DTYPES, TensorFile, TensorSpec, as_bytes, content_hash

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "MAX_SHARD_SIZE",
    "SHARD_NAME",
    "ShardedWriter",
    "TensorFile",
    "TensorFolder",
    "TensorSpec",
    "as_bytes",
    "content_hash",
    "plan_shards",
    "read_json",
]

MAX_SHARD_SIZE = 5_000_000_000  # bytes; what the Hub recommends for one file
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")


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
        try:
            for name, path in by_name.items():
                folder._files[name] = TensorFile(path, rule)
                for tensor in folder._files[name].specs():
                    if tensor in folder.weight_map:
                        raise FormatError(rule, path, tensor, f"is also in {folder.weight_map[tensor]}")
                    folder.weight_map[tensor] = name
        except BaseException:
            folder.close()
            raise
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

    def check_placement(self) -> None:
        """Open every file, and refuse a tensor that the index does not place where it is."""
        for tensor in {file: tensor for tensor, file in self.weight_map.items()}.values():
            file = self._open(tensor)
            stray = [name for name in file.specs() if self.weight_map.get(name) != self.weight_map[tensor]]
            if stray:
                raise FormatError(self._rule, file.path, stray[0], "is here, although the index does not say so")

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
