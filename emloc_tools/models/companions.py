"""The small files that a copy of a model needs beside its weights: tokenizer, processor, generation settings."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

from emloc_tools.models.source import COMPANIONS, Source

NOT_COPIED = (
    "config.json",
    "*.index.json",
    "emulator.json",
    "emloc.json",
    "emloc-*.json",
    "adapter_*.json",
    "trainer_state.json",
    "training*.json",
)


TOKENIZER = "tokenizer_config.json"
# transformers 5 writes a class name that 4 does not have; both know the older name of the same class.
OLDER_NAME = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def copy_companions(source: Source, folder: Path) -> list[str]:
    """Copy a base model's companion files into `folder` and return their names.

    They are copied as they are, but for a tokenizer's class name that only transformers 5 has.
    """
    copied = []
    for path in sorted(source.folder.iterdir()):
        matches = any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS)
        left_out = any(fnmatch.fnmatch(path.name, pattern) for pattern in NOT_COPIED)
        if path.is_file() and matches and not left_out:
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    if TOKENIZER in copied:
        _name_as_before(folder / TOKENIZER)
    return copied


def _name_as_before(path: Path) -> None:
    """Give the tokenizer's class the name that transformers 4 knows, too. Anything unexpected stays as it is."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return
    older = OLDER_NAME.get(config.get("tokenizer_class", "")) if isinstance(config, dict) else None
    if older is not None:
        config["tokenizer_class"] = older
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
