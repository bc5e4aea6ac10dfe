"""Gram matrices (uncentred second moments) of calibration data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emloc_tools.records import Layer, Side

ROWS_PER_PRODUCT = 2048  # bounds the float32 copy of a bf16 activation: 2048 x 14336 x 4 bytes = 117 MB


def accumulate(G: torch.Tensor, X: torch.Tensor) -> None:
    """Add `XᵀX` to `G (n, n)` in place, in G's dtype, for `X (tokens, n)` of any float dtype.

    The product is taken in G's dtype (float32) and not in X's: a product with bfloat16 output is wrong by
    1.6e-3 relative and has negative eigenvalues.
    """
    for rows in torch.split(X, ROWS_PER_PRODUCT):
        rows = rows.to(G.dtype)
        G.addmm_(rows.T, rows)


def smaller_side(layers: Sequence[Layer]) -> Side:
    """Which Grams are smaller for layers that read the same tensor: one of that input, or one per output."""
    outputs = sum(layer.out_features**2 for layer in layers)
    return "output" if outputs < layers[0].in_features ** 2 else "input"
