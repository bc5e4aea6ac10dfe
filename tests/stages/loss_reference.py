"""Gradients of a loss at linear layers by autograd on a float64 model in memory, and what folders hold of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.stages.reference import linears, read_json, read_tensors, weight_of


@dataclass
class GradientMoments:
    """`Σ g gᵀ (out, out)`, `Σ (Wᵀg)(Wᵀg)ᵀ (in, in)` and `Σ ‖g‖²` of a layer over its tokens, float64."""

    outside: torch.Tensor
    inside: torch.Tensor
    energy: float
    tokens: int

    def of(self, side: str) -> torch.Tensor:
        return {"output_gradient": self.outside, "input_gradient": self.inside}[side]


Sample = tuple[list[int], int]  # token ids, and the position of the first one that is a target
Loss = Callable[[Any], torch.Tensor]


def next_token_loss(sample: Sample) -> Loss:
    """Cross-entropy summed over the sample's targets; nothing predicts the first token."""
    ids, first = sample
    start = max(first, 1)

    def loss(model: Any) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        return F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum")

    return loss


def gradient_moments(model: nn.Module, losses: Sequence[Loss], mask: torch.Tensor | None = None) -> Any:
    """The moments per layer over all losses; rows that `mask (batch, length)` says are padding do not count."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    model.set_experts_implementation("eager")  # fused experts have no float64 kernel
    found: dict[str, GradientMoments] = {}
    real = slice(None) if mask is None else mask.reshape(-1)

    def hook(name: str) -> Any:
        def see(g: torch.Tensor) -> None:
            W = weight_of(model.get_submodule(name))
            rows = g.reshape(-1, g.shape[-1])[real]
            inside = rows @ W
            seen = found.setdefault(name, GradientMoments(torch.zeros(len(W), len(W)), torch.zeros(()), 0.0, 0))
            seen.outside = seen.outside + rows.T @ rows
            seen.inside = seen.inside + inside.T @ inside
            seen.energy += float((rows**2).sum())
            seen.tokens += len(rows)

        def tap(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            result = output.clone()
            result.register_hook(see)
            return result

        return tap

    for name, module in linears(model).items():
        module.register_forward_hook(hook(name))
    for loss in losses:
        loss(model).backward()
    return found


def read_gradients(folder: Path) -> dict[str, tuple[str, int, float, torch.Tensor]]:
    """Per layer of a calibration folder: side, tokens, energy, and the whole Gram of the gradient in float64."""
    tensors, found = read_tensors(folder), {}
    for record in read_json(folder / "calibration.json")["grams"]:
        if record["side"] in ("output_gradient", "input_gradient"):
            (layer,) = record["layers"]
            G = unpacked(tensors[record["tensor"]], record["features"])
            found[layer] = (record["side"], record["tokens"], record["energy"], G)
    return found


def data_part(folder: Path) -> dict[tuple[str, ...], tuple[str, int, torch.Tensor]]:
    """The Grams of the data in a calibration folder, packed as they are stored: side, tokens, values."""
    tensors = read_tensors(folder)
    return {
        tuple(record["layers"]): (record["side"], record["tokens"], tensors[record["tensor"]])
        for record in read_json(folder / "calibration.json")["grams"]
        if record["side"] in ("input", "output")
    }


def unpacked(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The symmetric matrix (n, n) of a packed lower triangle, float64."""
    G = torch.zeros(n, n, dtype=torch.float64)
    G[tuple(torch.tril_indices(n, n))] = packed.double()
    return G + G.tril(-1).T
