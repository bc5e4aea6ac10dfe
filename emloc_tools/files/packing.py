"""Symmetric matrices as their packed lower triangles, as `formats/README.md` has them."""

from __future__ import annotations

import torch


def pack_lower(G: torch.Tensor) -> torch.Tensor:
    """The lower triangle of the symmetric `G (n, n)`, row by row: `(n(n+1)/2,)`, entry (i, j) at i(i+1)/2 + j."""
    n = G.shape[0]
    packed = torch.empty(packed_size(n), dtype=G.dtype)
    for i in range(n):
        packed[i * (i + 1) // 2 :][: i + 1] = G[i, : i + 1]
    return packed


def unpack_lower(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The symmetric `(n, n)` matrix of a packed lower triangle; the inverse of `pack_lower`."""
    G = torch.empty(n, n, dtype=packed.dtype)
    for i in range(n):
        row = packed[i * (i + 1) // 2 :][: i + 1]
        G[i, : i + 1] = row
        G[: i + 1, i] = row
    return G


def packed_diagonal(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The diagonal `(n,)` of a packed lower triangle."""
    i = torch.arange(n)
    return packed[i * (i + 1) // 2 + i]


def packed_size(n: int) -> int:
    """Number of values in the packed triangle of an `(n, n)` matrix."""
    return n * (n + 1) // 2
