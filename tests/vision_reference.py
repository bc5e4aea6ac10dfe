"""What tests of models that read images compare with: Grams by plain hooks on a float64 model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tests.stages.reference import weight_of

Moments = tuple[torch.Tensor, torch.Tensor, int]  # XᵀX, YᵀY of the outputs without bias, and the rows


def moments(model: Any, calls: Sequence[Mapping[str, torch.Tensor]], layers: Iterable[str]) -> dict[str, Moments]:
    """The moments of each layer over all calls, float64. A call is one sample, so nothing is padded."""
    model = copy.deepcopy(model).double()
    found: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            X = args[0].reshape(-1, args[0].shape[-1])
            Y = X @ weight_of(module).T
            inputs, outputs, rows = found.get(name, (0, 0, 0))
            found[name] = (inputs + X.T @ X, outputs + Y.T @ Y, rows + len(X))

        return see

    for name in layers:
        model.get_submodule(name).register_forward_hook(hook(name))
    with torch.no_grad():
        for call in calls:
            model(**call)
    return found
