"""Layers and calibration data for the tests of the numeric core, in float64 on the CPU."""

from __future__ import annotations

import torch
from hypothesis import settings

from emloc_tools.records import Gram, Layer, LowRank, Side

# The first call into a linear algebra library can take longer than hypothesis allows an example.
property_test = settings(deadline=None, derandomize=True, max_examples=60)
SHAPES = [(12, 20), (20, 12), (16, 16)]


def layer(name: str, out_features: int, in_features: int) -> Layer:
    return Layer(name, out_features, in_features, orientation="linear", has_bias=False)


def weight(out_features: int, in_features: int, *, seed: int = 0) -> torch.Tensor:
    """A random weight (out, in) that keeps the scale of its input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator, dtype=torch.float64) / in_features**0.5


def inputs(tokens: int, features: int, *, decay: float = 1.0, seed: int = 1) -> torch.Tensor:
    """Correlated data (tokens, features): standard deviations i^-decay along random orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))
    deviations = torch.arange(1, features + 1, dtype=torch.float64) ** -decay
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) * deviations @ Q.T


def gram(X: torch.Tensor, W: torch.Tensor, side: Side) -> Gram:
    """The Gram of a layer's inputs or outputs, as exact as float64 has it."""
    Z = X if side == "input" else X @ W.T
    return Gram(Z.T @ Z, side, len(X))


def dense(low_rank: LowRank) -> torch.Tensor:
    """W_E in float64 on the CPU."""
    U, S, Vh = (factor.double().cpu() for factor in (low_rank.U, low_rank.S, low_rank.Vh))
    return U @ torch.diag(S) @ Vh


def output_error(W_E: torch.Tensor, W: torch.Tensor, X: torch.Tensor) -> float:
    """‖X Wᵀ − X W_Eᵀ‖ / ‖X Wᵀ‖."""
    return float((X @ (W - W_E).T).norm() / (X @ W.T).norm())


def truncated_svd(W: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of W itself, which knows nothing of the data."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]
