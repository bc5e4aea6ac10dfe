"""Small networks of plain modules for the streamed backward: a block, a chain of three, batches and a loss."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from emloc_tools.streaming.backward import BackwardLockStep
from tests.streaming.backward_reference import (
    EXACT,
    collect,
    distance,
    reference,
    stream_module_backward,
)

WIDTH = 8
TOKENS = 20


class Plain(nn.Module):
    """A layer with more outputs than inputs and one with fewer, the first result changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).mul_(1.5).sin_())  # type: ignore[no-any-return]


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    # The first batch's tensors are large enough to go to disk between units.
    return [torch.randint(TOKENS, shape, generator=generator) for shape in ((50, 40), (2, 7), (3, 5), (1, 9))]


def loss(batch: int, logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batches()[batch].flatten())


class Chain(nn.Module):
    """Embeddings, three blocks of which the middle one is of the given kind, and a head."""

    middle: type[nn.Module] = Plain

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Plain(), self.middle(), Plain()])
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first, middle, last = self.blocks
        return self.head(last(self.between(middle, first(self.embed(ids)))))  # type: ignore[no-any-return]

    def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return middle(x)  # type: ignore[no-any-return]


def run_chain(make: type[Chain], folder: Path) -> BackwardLockStep:
    _, stream, _ = stream_module_backward(make, folder)
    stream.run_backward([lambda ids=ids: stream.model(ids) for ids in batches()], loss)  # type: ignore[misc]
    return stream


def require_right_gradients(make: type[Chain], folder: Path) -> None:
    model, stream, layers = stream_module_backward(make, folder)
    made = batches()
    expected = reference(model, layers, [lambda ids=ids: model(ids) for ids in made], loss)  # type: ignore[misc]
    found = collect(stream, [lambda ids=ids: stream.model(ids) for ids in made], loss)  # type: ignore[misc]
    assert distance(found, expected) < EXACT
