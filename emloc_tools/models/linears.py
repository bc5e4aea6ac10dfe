"""Which modules are plain linear layers, whatever their class is called."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes `y = W x + b` and nothing else: a Linear, a Conv1D, or a subclass of Linear that does.

    Some models have a Linear of their own (Falcon's adds the bias apart). Others use the name for something more: a
    router that also chooses experts, or a layer with a second weight.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    has_more = set(module._parameters) != {"weight", "bias"} or any(True for _ in module.children())
    return isinstance(module, nn.Linear) and not has_more and _is_plain(cast(Any, type(module)))


@functools.cache
def _is_plain(kind: Any) -> bool:
    """Whether a subclass computes what Linear does, tried on a small one."""
    if kind.forward is nn.Linear.forward:
        # Only called: torch's attention, for one, reads the weight of such a layer without calling it.
        return str(kind.__module__).partition(".")[0] != "torch"
    generator = torch.Generator().manual_seed(0)
    W, b, x = (torch.randn(*shape, generator=generator) for shape in ((3, 5), (3,), (2, 4, 5)))
    small = kind.__new__(kind)
    nn.Module.__init__(small)
    small.in_features, small.out_features = 5, 3
    small.weight, small.bias = nn.Parameter(W), nn.Parameter(b)
    try:
        with torch.no_grad():
            y = small(x)
    except Exception:  # it needs what its own constructor sets, so it is something more
        return False
    if not isinstance(y, torch.Tensor) or y.shape != (2, 4, 3):
        return False
    return torch.allclose(y, F.linear(x, W, b), atol=1e-5)
