"""Linear layers are known by what they compute: subclasses that do the same count, those that do more do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from emloc_tools.models.linears import is_linear


class Renamed(nn.Linear):
    """The same under another name."""


class Apart(nn.Linear):
    """The same sum, written otherwise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.bias + input @ self.weight.T


class Gated(nn.Linear):
    """Of the right shape, but not linear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight, self.bias).relu()


class Scaled(nn.Linear):
    """Has one more parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(()))


class Pair(nn.Linear):
    """Gives two results."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        y = F.linear(input, self.weight, self.bias)
        return y, y.softmax(-1)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(4, 3), Conv1D(3, 4), Renamed(4, 3), Apart(4, 3), FalconLinear(4, 3)],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_a_product_and_a_bias_is_linear(module: nn.Module) -> None:
    assert is_linear(module)


@pytest.mark.parametrize(
    "module",
    [
        Gated(4, 3),
        Scaled(4, 3),
        Pair(4, 3),
        IdeficsDecoupledLinear(4, 3, out_additional_features=2),
        PhimoeTopKRouter.__new__(PhimoeTopKRouter, None),
        nn.MultiheadAttention(8, 2).out_proj,  # its attention reads the weight and never calls it
        nn.Embedding(4, 3),
        nn.Bilinear(4, 3, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_more_is_not(module: nn.Module) -> None:
    if not module.__dict__.get("_parameters"):
        nn.Linear.__init__(module, 4, 3)  # a router, whose own constructor wants a configuration
    assert not is_linear(module)


def test_a_look_at_a_layer_leaves_the_random_state_alone() -> None:
    class Fresh(Apart):
        """Not seen before, so that it is tried."""

    layer, before = Fresh(4, 3), torch.get_rng_state()
    assert is_linear(layer)
    assert torch.equal(torch.get_rng_state(), before)
