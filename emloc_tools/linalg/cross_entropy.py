"""Cross-entropy over a large vocabulary, a few rows at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # the label of a row that does not count
ROWS_PER_SOFTMAX = 512  # bounds the float32 copies of the logits: 512 x 128256 x 4 bytes = 263 MB each


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`Σ -log softmax(logits)[label]` in nats over all rows whose label is not `IGNORED`, a scalar.

    `logits (..., vocabulary)` may have any strides; `labels (...)` are int64 on the same device. Computed and returned
    in the dtype of the logits, but at least in float32; their gradient has the logits' own dtype. Beyond the logits and
    their gradient, memory holds a few copies of `ROWS_PER_SOFTMAX` rows: the softmax is computed again in the backward.
    Differentiable once.
    """
    return _SummedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call, no-any-return]


class _SummedCrossEntropy(torch.autograd.Function):
    """Not torch.utils.checkpoint: it would slice the logits, and each slice's gradient is as large as all of them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum over chunks of rows, which is done in Python's float64."""
        ctx.save_for_backward(logits, labels)
        working = torch.promote_types(logits.dtype, torch.float32)
        total = 0.0
        for rows in _chunks(labels):
            total += float(F.cross_entropy(logits[rows].to(working), labels[rows], reduction="sum"))
        return torch.tensor(total, dtype=working, device=logits.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of a row is `softmax(row) - onehot(label)`, and zero if it is ignored."""
        logits, labels = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for rows in _chunks(labels):
            gradient[rows] = _gradient(logits[rows], labels[rows], upstream)
        return gradient, None


def _gradient(logits: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """The gradient of one chunk. A function of its own, so that it is freed before the next one."""
    part = torch.softmax(logits.to(upstream.dtype), -1)
    part[torch.arange(len(part), device=part.device), labels] -= 1
    return part.mul_(upstream).to(logits.dtype)


def _chunks(labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Indices of the rows that count, as many as one softmax takes."""
    for chunk in (labels != IGNORED).nonzero().split(ROWS_PER_SOFTMAX):  # type: ignore[no-untyped-call]
        yield chunk.unbind(1)
