"""The loss that calibrate --gradients starts from: its value, and that it never copies all logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emloc_tools.data.batches import Batch
from emloc_tools.linalg.cross_entropy import ROWS_PER_SOFTMAX
from emloc_tools.stages.gradient_sums import batch_loss

LENGTH, VOCABULARY = 8 * ROWS_PER_SOFTMAX, 600
CHUNK = ROWS_PER_SOFTMAX * VOCABULARY * 4  # bytes of one chunk in float32


class LiveBytes(TorchDispatchMode):
    """The largest sum of the memory of all tensors that were made in this mode and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and self._key(leaf) not in before:
                storage = leaf.untyped_storage()
                self._storages[self._key(leaf)] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._storages.values()))
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata


def batch_and_logits() -> tuple[Batch, torch.Tensor]:
    """One long sample in two rows, a quarter of its tokens no targets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, LENGTH // 2), generator=generator)
    targets = torch.rand(ids.shape, generator=generator) > 1 / 4
    logits = torch.randn(*ids.shape, VOCABULARY, generator=generator).bfloat16().requires_grad_()
    return Batch({"input_ids": ids}, None, targets), logits


def all_rows_at_once(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """The plain way."""
    assert batch.targets is not None
    wanted = batch.targets[:, 1:]
    labels = batch.inputs["input_ids"][:, 1:][wanted]
    return F.cross_entropy(logits[:, :-1][wanted].float(), labels, reduction="sum")


def in_chunks(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    return batch_loss(batch, SimpleNamespace(logits=logits), nn.Identity())


def run(loss: Callable[[Batch, torch.Tensor], torch.Tensor]) -> tuple[float, torch.Tensor, int]:
    """The loss, its gradient, and the peak memory beyond the logits in bytes."""
    batch, logits = batch_and_logits()
    with LiveBytes() as live:
        value = loss(batch, logits)
        value.backward()
    assert logits.grad is not None
    return float(value.detach()), logits.grad, live.peak


def test_the_loss_takes_the_memory_of_some_chunks_and_the_gradient() -> None:
    value, gradient, peak = run(in_chunks)
    plain_value, plain_gradient, plain_peak = run(all_rows_at_once)
    bound = gradient.nbytes + 3 * CHUNK
    assert peak < bound
    assert plain_peak > 2 * bound, "the control"
    assert abs(value - plain_value) < 1e-6 * plain_value
    torch.testing.assert_close(gradient, plain_gradient)
