"""Safetensors files put together byte by byte, right or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of a header (an object, or its literal bytes) and data; `length` may lie about the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """A header's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def put(folder: Path, name: str, data: bytes) -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(data)
    return path
