"""Write an emulator's weights as a plain dense model of the base's class, and a note that says what it is.

`emloc-export.json` is provenance and no format of its own. It marks the folder as one that `--overwrite` may replace
and that is no base, and its hash of the emulator tells `correct` whether an adapter was trained on that one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.emulator import STEMS
from emloc_tools.files.folders import write_json, write_text
from emloc_tools.files.json_files import read_json
from emloc_tools.files.manifest import file_hash
from emloc_tools.files.opening import path_inside
from emloc_tools.files.tensors import ShardedWriter, TensorSpec
from emloc_tools.records import Library

NOTE = "emloc-export.json"

CARD = """---
library_name: {library}
base_model: {base}
tags:
- emloc
- emulator
---

# Dense EMLoC emulator of {base}

The low-rank weights of an emulator of **{base}**, multiplied out into an ordinary {architecture} by emloc-tools
{version}. It takes as much memory as the base and computes what the emulator computes: it is for trainers that read a
layer's weight themselves. It is not a model to use by itself.

1. Train a LoRA on it with any trainer; no `trust_remote_code` is needed.
2. Run `emloc-tools correct --emulator EMULATOR --adapter YOUR_LORA --base {base} --output CORRECTED`, with the emulator
   that this was made from.
3. Use the corrected LoRA with {base}.

Which emulator that is stands in `{note}`.
"""


def exported_emulator(folder: Path) -> str | None:
    """The hash of the emulator whose dense form is in `folder`; None if it is none or no folder."""
    if not _is_folder(folder):
        return None
    path = path_inside(folder, NOTE, "export note")
    found = read_json(path, "export note").get("emulator") if path else None
    return found if isinstance(found, str) else None


def emulator_in(folder: Path) -> str | None:
    """The hash of the emulator in `folder`, as factors or in its dense form; None if there is none."""
    if not _is_folder(folder):
        return None
    path = path_inside(folder, EMULATOR, "emulator")
    return file_hash(path) if path is not None and path.is_file() else exported_emulator(folder)


def _is_folder(path: Path) -> bool:
    """Also of names that can be none, as adapters may hold: too long, or with a NUL."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


class ExportWriter:
    """Writes the tensors of a dense export for `library` one at a time, then everything else."""

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], *, max_shard_size: int, library: Library) -> None:
        self._folder, self._library = folder, library
        metadata = {"format": "pt"}
        self.tensors = ShardedWriter(folder, STEMS[library], specs, max_shard_size=max_shard_size, metadata=metadata)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place."""
        self.tensors.write(name, tensor)

    def finish(self, *, config: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        """Write the index, config.json, the note and a model card."""
        if len(self.tensors.finish()) > 1:
            index = {"metadata": {"total_size": self.tensors.total_size}, "weight_map": self.tensors.weight_map}
            write_json(self._folder / f"{STEMS[self._library]}.safetensors.index.json", index)
        write_json(self._folder / "config.json", config)
        write_json(self._folder / NOTE, note)
        card = CARD.format(
            library=self._library,
            base=note["base"]["id"],
            architecture=note["base"]["architecture"],
            version=note["made_by"]["emloc_tools"],
            note=NOTE,
        )
        write_text(self._folder / "README.md", card)

    def close(self) -> None:
        """Close the shards; without `finish` they are incomplete."""
        self.tensors.close()
