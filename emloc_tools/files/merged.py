"""Write a merged model: a plain Hugging Face model folder in the layout of its base, and a note of what it is.

`emloc-merge.json` is provenance and no format of its own. It marks the folder as one that `--overwrite` may replace,
and tells `merge` which adapter is in the model already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.emulator import STEMS
from emloc_tools.files.folders import write_json, write_text
from emloc_tools.files.json_files import read_json
from emloc_tools.files.opening import path_inside
from emloc_tools.files.tensors import ShardedWriter, TensorSpec
from emloc_tools.records import Library

NOTE = "emloc-merge.json"

CARD = """---
library_name: {library}
base_model: {base}
tags:
- emloc
- merged
---

# {base}, merged with a LoRA

**{base}** ({architecture}) with {what}; made by emloc-tools {version}.

It is an ordinary dense model: load it as its base. {changed} of its {tensors} tensors differ from the base's. What it
was made from is in `{note}`.
"""


def merged_adapter(folder: Path) -> str | None:
    """The hash of the adapter that was merged into the model in `folder`; None if it is no merged model."""
    path = path_inside(folder, NOTE, "merge note")
    adapter = read_json(path, "merge note").get("adapter") if path else None
    found = adapter.get("hash") if isinstance(adapter, dict) else None
    return found if isinstance(found, str) else None


class MergedWriter:
    """Writes the tensors of a merged model of `library` one at a time, then everything else."""

    def __init__(
        self, folder: Path, specs: Sequence[TensorSpec], *, max_shard_size: int, library: Library = "transformers"
    ) -> None:
        self._folder, self._library = folder, library
        metadata = {"format": "pt"}
        self.tensors = ShardedWriter(folder, STEMS[library], specs, max_shard_size=max_shard_size, metadata=metadata)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place."""
        self.tensors.write(name, tensor)

    def finish(self, *, config: str, note: Mapping[str, Any], what: str, changed: int) -> None:
        """Write the index, the text of config.json, the note and a model card that says `what` was merged."""
        files = self.tensors.finish()
        if len(files) > 1:
            metadata = {"total_size": self.tensors.total_size}
            index = {"metadata": metadata, "weight_map": self.tensors.weight_map}
            write_json(self._folder / f"{STEMS[self._library]}.safetensors.index.json", index)
        write_text(self._folder / "config.json", config)
        write_json(self._folder / NOTE, note)
        card = CARD.format(
            library=self._library,
            base=note["base"]["id"],
            architecture=note["base"]["architecture"],
            version=note["made_by"]["emloc_tools"],
            what=what,
            changed=changed,
            tensors=len(self.tensors.weight_map),
            note=NOTE,
        )
        write_text(self._folder / "README.md", card)

    def close(self) -> None:
        """Close the shards; without `finish` they are incomplete."""
        self.tensors.close()
