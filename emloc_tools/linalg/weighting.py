"""Emulators whose error is weighted by how much the loss minds it.

To first order an error at a layer's output changes the loss by its product with the loss gradient g there. So the
error is measured as ‖Rᵀ (W − W_E) Xᵀ‖ with `H = R Rᵀ` the second moments of g, damped, instead of ‖(W − W_E) Xᵀ‖: a
direction of the output that the loss does not mind may be wrong. (The Kronecker-factored curvature of the loss in W
is `E[g gᵀ] ⊗ E[x xᵀ]`; this is its norm.)

In suitable coordinates, `W = back · W̃`, that is the unweighted problem for W̃, so `lowrank.decompose` does the work:

- out ≤ in: `W̃ = Rᵀ W`, `back = R⁻ᵀ`.
- out > in: H (out, out) is not needed. `Wᵀ H W = L Lᵀ (in, in)` is the second moment of `Wᵀ g`, which is the gradient
  at the layer's input; `W̃ = Lᵀ`, `back = W L⁻ᵀ`, for `‖Rᵀ W (I − Q) Xᵀ‖ = ‖Lᵀ (I − Q) Xᵀ‖` for every Q.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from emloc_tools.errors import NumericalError
from emloc_tools.linalg.lowrank import LinAlgError, decompose, noise_level, output_energies
from emloc_tools.records import GradientGram, Gram, LowRank

DAMPING = 0.05  # of the mean squared gradient, added to every direction: none is ever worth nothing


def decompose_weighted(
    W: torch.Tensor,
    rank: int,
    gram: Gram,
    gradient: GradientGram,
    *,
    damping: float = DAMPING,
    dtype: torch.dtype = torch.float64,
) -> LowRank:
    """The emulator of `W (out, in)` with `rank` directions that is best in the norm weighted by the loss gradient.

    `energies` and the relative error that follows from them are weighted: H is scaled to a mean diagonal of 1, so they
    compare with those of an unweighted emulator. U has no orthonormal columns; at full rank the factors give W.
    A layer that the loss does not depend on (no gradient at all) is not weighted. Everything runs in `dtype` on W's
    device. Raises `NumericalError` as `lowrank.decompose` does.
    """
    if gradient.energy == 0:
        return decompose(W, rank, gram, dtype=dtype)
    weighted, weighted_gram, back = _coordinates(W.to(dtype), gram, gradient, damping)
    low_rank = decompose(weighted, rank, weighted_gram, dtype=dtype)
    return replace(low_rank, U=(back @ low_rank.U.to(dtype)).float())


def loss_energies(
    W: torch.Tensor,
    gram: Gram,
    gradient: GradientGram,
    *,
    damping: float = DAMPING,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """What each direction of the weighted emulator is worth to the loss: `(min(out, in),)`, float64, descending.

    These are weighted energies times `sensitivity`, in units of the squared loss, so layers can be compared.
    """
    if gradient.energy == 0:
        return torch.zeros(min(W.shape), dtype=torch.float64)
    weighted, weighted_gram, _ = _coordinates(W.to(dtype), gram, gradient, damping)
    per_token = output_energies(weighted, weighted_gram, dtype=dtype) / max(1, gram.tokens)
    return per_token * sensitivity(gram, gradient, W.shape[0])


def sensitivity(gram: Gram, gradient: GradientGram, out_features: int) -> float:
    """What a layer's weighted energy per token is worth to the loss: mean squared gradient entry times tokens."""
    return gradient.energy / (out_features * max(1, gradient.tokens)) * gram.tokens


def _coordinates(
    W: torch.Tensor, gram: Gram, gradient: GradientGram, damping: float
) -> tuple[torch.Tensor, Gram, torch.Tensor]:
    """`W̃`, the Gram of the layer in its coordinates, and `back` with `W = back · W̃`."""
    if not damping > 0:
        raise ValueError(f"damping {damping:g} must be above 0")
    matrix = gradient.matrix.to(W.device, W.dtype)
    if not torch.isfinite(W).all():
        raise NumericalError("the weight holds NaN or infinity")
    if not torch.isfinite(matrix).all():
        raise NumericalError("the second moments of the gradient hold NaN or infinity")
    matrix = matrix * (W.shape[0] / gradient.energy)  # the mean diagonal of Σ g gᵀ becomes 1
    if gradient.side == "output":
        eigenvalues, Q = _eigh(matrix)
        root = ((eigenvalues.clamp(min=0) + damping) / (1 + damping)).sqrt()
        R = Q * root
        moved = gram if gram.side == "input" else replace(gram, matrix=R.T @ gram.matrix.to(R) @ R)
        return R.T @ W, moved, Q / root
    eigenvalues, Q = _eigh((matrix + damping * (W.T @ W)) / (1 + damping))
    root = eigenvalues.clamp(min=0).sqrt()
    # A direction that W itself ignores has no energy here, and W is zero on it. Only what the eigensolver leaves of
    # such zeros may be taken for one: where one direction of the gradient is far above all others, these stand little
    # above its rounding.
    kept = eigenvalues > noise_level(W.dtype, float32_sums=False) * eigenvalues[-1]
    inverse = torch.where(kept, 1 / root.where(kept, 1), 0)
    return (Q * root).T, gram, W @ (Q * inverse)


def _eigh(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors of the symmetric A."""
    try:
        eigenvalues, Q = torch.linalg.eigh(A)
    except LinAlgError as error:
        raise NumericalError(f"the eigendecomposition of a {tuple(A.shape)} matrix failed: {error}") from error
    return eigenvalues, Q
