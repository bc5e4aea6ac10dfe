"""Ways to damage a folder: in JSON, in bytes, in the header or the values of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.tensor_file import TensorFile, as_bytes, content_hash

Damage = Callable[[Path], None]


def in_json(file: str, change: Callable[[Any], object]) -> Damage:
    """Change the object in a JSON file."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text(encoding="utf-8"))
        change(value)
        (folder / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    return damage


def in_bytes(file: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of a file."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return damage


def in_header(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of a safetensors file and leave the tensors' bytes."""

    def changed(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[end:]

    return in_bytes(file, changed)


def in_tensor(file: str, name: str, change: Callable[[torch.Tensor], object], *, manifest: str = "") -> Damage:
    """Change a tensor's values in place; with `manifest` its hash there is that of the new values."""

    def damage(folder: Path) -> None:
        opened = TensorFile(folder / file)
        tensor, before = opened.read(name), content_hash(opened.read(name))
        opened.close()
        old = bytes(as_bytes(tensor))
        change(tensor)
        in_bytes(file, lambda data: data.replace(old, bytes(as_bytes(tensor)), 1))(folder)
        if manifest:
            text = (folder / manifest).read_text(encoding="utf-8")
            (folder / manifest).write_text(text.replace(before, content_hash(tensor)), encoding="utf-8")

    return damage


def both(*damages: Damage) -> Damage:
    """Several damages, in order."""

    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def remove(file: str) -> Damage:
    """Remove a file."""
    return lambda folder: (folder / file).unlink()
