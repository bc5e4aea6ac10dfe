"""Models that hold tokens otherwise than as `(batch, length)`: the length first, or with padding of their own.

Longformer, LED and BigBird fill up texts to whole windows before their first block, and cut that off after the last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

# By model type, the layers that read (length, batch, features). No shape tells, where a batch has as many texts as
# tokens.
LENGTH_FIRST = {
    "fsmt": r"\.layers\.",
    "led": r"\.longformer_self_attn\.",
    "longformer": r"\.attention\.self\.",
    "xlnet": r"\blayer\.\d+\.",
}
TEXTS = ("input_ids", "inputs_embeds")


class Layouts:
    """Brings masks `(batch, length)` of real tokens, True for real, into the layout of what a layer reads."""

    def __init__(self, model: nn.Module, inputs: Sequence[Mapping[str, torch.Tensor]]) -> None:
        config = getattr(model, "config", None)
        pattern = LENGTH_FIRST.get(getattr(config, "model_type", ""))
        self._length_first = pattern and re.compile(pattern)
        window = _window(config)
        self._added = [_added(batch, window) for batch in inputs]
        self._sizes = [_size(batch) for batch in inputs]
        self._filled_up: set[tuple[int, str]] = set()  # batches and layers that read whole windows

    def of(self, batch: int, layer: str, mask: torch.Tensor | None, x: torch.Tensor | None) -> torch.Tensor | None:
        """The mask for what a layer reads in a batch, which is `x` in the forward; None where everything is real.

        It has the leading dimensions of x, so that its rows are those of x.
        """
        if added := self._added[batch]:
            rows, length = self._sizes[batch]
            if x is not None and x.numel() == rows * (length + added) * x.shape[-1]:
                self._filled_up.add((batch, layer))
            if (batch, layer) in self._filled_up:
                mask = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask
                mask = nn.functional.pad(mask, (0, added), value=False)
        if mask is not None and self._length_first and self._length_first.search(layer):
            return mask.T
        return mask


def _window(config: Any) -> int:
    """The number of tokens of which a model makes texts a multiple; 1 for most."""
    window = getattr(config, "attention_window", None)
    if isinstance(window, (list, tuple)):
        window = max(window)
    if window is None and getattr(config, "attention_type", None) == "block_sparse":
        window = config.block_size
    return window if isinstance(window, int) and window > 0 else 1


def _size(inputs: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Texts and tokens in a batch."""
    text = next((inputs[name] for name in TEXTS if name in inputs), None)
    return (text.shape[0], text.shape[1]) if text is not None and text.dim() > 1 else (0, 0)


def _added(inputs: Mapping[str, torch.Tensor], window: int) -> int:
    length = _size(inputs)[1]
    return math.ceil(length / window) * window - length
