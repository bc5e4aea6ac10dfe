"""transformers, accelerate and Unsloth: the programs in `scripts/`, with the settings of one training in them.

They are files of their own and not texts in here, so that they are checked like all other code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_tools.trainers.settings import Settings

SCRIPTS = Path(__file__).parent / "scripts"


def with_transformers(settings: Settings, name: str) -> Mapping[str, str]:
    """A program on the Trainer of transformers."""
    return {name: _filled("train_with_transformers.py", settings)}


def with_accelerate(settings: Settings, name: str) -> Mapping[str, str]:
    """A program with a training loop of its own, for one process or several (DDP, FSDP)."""
    return {name: _filled("train_with_accelerate.py", settings)}


def with_unsloth(settings: Settings, name: str) -> Mapping[str, str]:
    """A program on Unsloth and TRL."""
    return {name: _filled("train_with_unsloth.py", settings)}


def _filled(script: str, settings: Settings) -> str:
    """The program with each of its constants set anew: the lines `NAME = …` at its beginning."""
    text = (SCRIPTS / script).read_text(encoding="utf-8")
    values: dict[str, Any] = {
        "EMULATOR": settings.emulator,
        "DATA": settings.data,
        "ADAPTER": settings.adapter,
        "DTYPE": settings.dtype,
        "FOUR_BITS": settings.four_bits,
        "TARGETS": list(settings.targets),
        "RANK": settings.rank,
        "ALPHA": settings.alpha,
        "LEARNING_RATE": settings.learning_rate,
        "BATCH_SIZE": settings.batch_size,
        "ACCUMULATION": settings.accumulation,
        "EPOCHS": settings.epochs,
        "STEPS": settings.steps,
        "MAX_LENGTH": settings.max_length,
        "NEXT": settings.next_command,
    }
    for name, value in values.items():
        line = f"{name} = {_literal(value)}"
        line = line.replace("\\", "\\\\")  # it is a template of a replacement
        text, count = re.subn(rf"^{name}(?:: [^=\n]+)? = .*$", line, text, flags=re.MULTILINE)
        assert count == 1, f"{script} must set {name} on one line"
    return text


def _literal(value: Any) -> str:
    """A value in Python, texts in double quotes as everywhere in the programs; JSON writes those as Python does."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, list)) else repr(value)
