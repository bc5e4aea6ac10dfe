"""What the tests of this room look at in a denoiser."""

from __future__ import annotations

import torch
from torch import nn


def outputs(model: nn.Module, calls: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The predictions for calls that all have the same shapes, stacked."""
    with torch.no_grad():
        return torch.stack([model(**call).sample for call in calls])


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear in the two lists of blocks."""
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)}
