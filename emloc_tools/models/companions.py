"""The small files that a copy of a model needs beside its weights: tokenizer, processor, generation settings."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

from emloc_tools.models.source import COMPANIONS, Source

NOT_COPIED = (
    "config.json",
    "*.index.json",
    "emulator.json",
    "emloc.json",
    "adapter_*.json",
    "trainer_state.json",
    "training*.json",
)


def copy_companions(source: Source, folder: Path) -> list[str]:
    """Copy a base model's companion files into `folder` and return their names."""
    copied = []
    for path in sorted(source.folder.iterdir()):
        matches = any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS)
        left_out = any(fnmatch.fnmatch(path.name, pattern) for pattern in NOT_COPIED)
        if path.is_file() and matches and not left_out:
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    return copied
