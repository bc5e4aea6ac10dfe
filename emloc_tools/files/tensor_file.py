"""One safetensors file: a checked header, and a reader into memory that the caller owns.

The safetensors library maps files into memory, and touched pages then count as ours and grow with the model's depth.
Stages here hold one unit of a model at a time, so the reader is written anew on the format's own definition: 8 bytes
of header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from emloc_tools.errors import FormatError
from emloc_tools.files.json_files import MAX_JSON, parse_object, whole_number
from emloc_tools.files.opening import open_regular, reason

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_DIMENSIONS = 64  # of a tensor; PyTorch's own kernels go no further


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
    """A tensor's identity: `xxh3_128:` and 32 hex digits over its dtype, shape and little-endian bytes.

    Hashed are the ASCII bytes of, for example, `BF16 [2, 3] ` (with the last space) and then the tensor's bytes.
    """
    tensor = tensor.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode())
    digest.update(as_bytes(tensor))
    return f"xxh3_128:{digest.hexdigest()}"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """One safetensors file: its checked header, and its tensors read one at a time.

    `rule` is the number that a `FormatError` names when the file is not valid safetensors.
    """

    def __init__(self, path: Path, rule: str = "safetensors") -> None:
        self.path, self.rule = path, rule
        self._file = open_regular(path, rule)
        try:
            self.metadata, self._specs, self._starts = self._read_header()
        except OSError as error:
            self._file.close()
            raise self._error("", f"cannot be read: {reason(error)}") from error
        except BaseException:
            self._file.close()
            raise

    def specs(self) -> dict[str, TensorSpec]:
        """All tensors of the file by name, in header order."""
        return self._specs

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor `name`, in `buffer` (1-D uint8, at least its bytes, suitably aligned) or in new memory."""
        spec = self._specs[name]
        if buffer is None:
            buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
        view = as_bytes(buffer[: spec.nbytes])
        done = 0
        try:
            self._file.seek(self._starts[name])
            while done < spec.nbytes:
                count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise self._error(name, f"ends after {done} of {spec.nbytes} bytes; the file was truncated")
                done += count
        except OSError as error:
            raise self._error(name, f"cannot be read: {reason(error)}") from error
        return buffer[: spec.nbytes].view(spec.dtype).view(spec.shape)

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorSpec], dict[str, int]]:
        """Metadata, specs, and where in the file each tensor's bytes start."""
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_JSON, size - 8):
            raise self._error("header", f"gives its length as {length} bytes in a file of {size}")
        data = self._file.read(length)
        if not data.startswith(b"{"):
            raise self._error("header", "does not begin with an opening brace")
        try:
            header = parse_object(data)
        except ValueError as error:
            raise self._error("header", f"is not strict JSON: {error}") from error
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("__metadata__", "must map strings to strings")
        specs, starts = {}, {}
        for name, value in header.items():
            specs[name], start = self._entry(name, value)
            starts[name] = 8 + length + start
        self._check_layout(specs, starts, 8 + length, size)
        return metadata, specs, starts

    def _entry(self, name: str, value: Any) -> tuple[TensorSpec, int]:
        if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
            raise self._error(name, "needs a dtype, a shape and two data_offsets")
        shape, offsets = value.get("shape"), value.get("data_offsets")
        if value["dtype"] not in DTYPES:
            raise self._error(name, f"has the unknown dtype {value['dtype']!r}")
        if not isinstance(shape, list) or not all(map(whole_number, shape)):
            raise self._error(name, "needs a shape of whole numbers >= 0")
        if len(shape) > MOST_DIMENSIONS or math.prod(max(side, 1) for side in shape) >= 1 << 60:
            raise self._error(name, "has a shape that no memory holds")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(whole_number, offsets)):
            raise self._error(name, "needs two data_offsets that are whole numbers >= 0")
        spec = TensorSpec(name, DTYPES[value["dtype"]], tuple(shape))
        if offsets[1] - offsets[0] != spec.nbytes:
            message = f"spans {offsets[1] - offsets[0]} bytes; {value['dtype']} {shape} needs {spec.nbytes}"
            raise self._error(name, message)
        return spec, offsets[0]

    def _check_layout(self, specs: dict[str, TensorSpec], starts: dict[str, int], end: int, size: int) -> None:
        """The tensors must follow each other without a gap from `end` of the header to the end of the file."""
        for name in sorted(specs, key=lambda name: (starts[name], specs[name].nbytes)):
            if starts[name] != end:
                message = f"starts at byte {starts[name]}, expected {end}: tensors overlap or leave a hole"
                raise self._error(name, message)
            end += specs[name].nbytes
        if end != size:
            what = "was truncated" if size < end else "holds bytes that belong to no tensor"
            raise self._error("", f"is {size} bytes long but its header describes {end}; the file {what}")

    def _error(self, field: str, message: str) -> FormatError:
        return FormatError(self.rule, self.path, field, message)
