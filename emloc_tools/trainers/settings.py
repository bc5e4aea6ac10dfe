"""What every trainer is told, whatever its configuration looks like; and the values of a YAML file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DataKind = Literal["text", "messages", "prompt"]


@dataclass(frozen=True)
class Settings:
    """A LoRA training. Paths are as the user gave them.

    `data` is JSONL of the kind `kind`. `dtype` is that of the emulator's weights, `steps` None for whole `epochs`.
    `next_command` corrects the trained LoRA in `adapter`. `four_bits` holds the emulator in 4 bits, by bitsandbytes.
    """

    emulator: str
    data: str
    kind: DataKind
    adapter: str
    dtype: Literal["float32", "bfloat16", "float16"]
    targets: tuple[str, ...]
    rank: int
    alpha: int
    learning_rate: float
    batch_size: int
    accumulation: int
    epochs: int
    steps: int | None
    max_length: int
    next_command: str
    four_bits: bool = False

    @property
    def length(self) -> dict[str, int]:
        """How long to train, by the names of transformers' arguments."""
        return {"num_train_epochs": self.epochs} if self.steps is None else {"max_steps": self.steps}


def yaml(lines: Mapping[str, Any]) -> str:
    """A YAML mapping. A key that begins with `#` is a comment above what follows, its value the text.

    Values are written as JSON, which YAML contains, so no name needs quoting rules of its own.
    """
    return "".join(
        f"# {value}\n" if key.startswith("#") else f"{key}: {_value(value)}\n" for key, value in lines.items()
    )


def heading(settings: Settings, run: str) -> dict[str, str]:
    """The comment at the top of every YAML file: how it is run, and what comes after it."""
    return {
        "#run": f"A LoRA on an EMLoC emulator, written by emloc-tools trainer-config. Run: {run}",
        "#next": f"Then: {settings.next_command}",
        "#paths": "Paths are relative to where that is run.",
    }


def _value(value: Any) -> str:
    # YAML 1.1 reads 2e-05 as a text, as it has no dot.
    return f"{value:f}".rstrip("0") if isinstance(value, float) and value else json.dumps(value, ensure_ascii=False)
