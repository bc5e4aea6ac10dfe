"""Correct a LoRA that was trained on an emulator so that it fits the original layer (EMLoC, section 3.3).

Three deliberate differences from the code released with the paper: the LoRA scaling enters the correction (theirs is
right only for alpha = r), everything is computed in float32, and the input is never changed in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from emloc_tools.errors import NumericalError

CLAMP = 3.0  # λ of the paper


@dataclass(frozen=True)
class Correction:
    """A corrected LoRA pair and what was done to it.

    `A (r, in)` has orthonormal rows (or zero rows where the trained A was rank-deficient), `B (out, r)`; float32.
    `directions` is the rank of the trained A, `clamped` how many of the directions the clamp bound. `delta_norm` is
    ‖D‖ after clamping and `update_norm` ‖s B'‖ before the correction, Frobenius norms.
    """

    A: torch.Tensor
    B: torch.Tensor
    directions: int
    clamped: int
    delta_norm: float
    update_norm: float


def correct_lora(
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    W: torch.Tensor,
    U: torch.Tensor,
    S: torch.Tensor,
    Vh: torch.Tensor,
    clamp: float | None = CLAMP,
) -> Correction:
    """The LoRA for the base layer `W (out, in)` from the pair `A (r, in)`, `B (out, r)` trained on `U diag(S) Vh`.

    With `A = Ua Σa A'` and `B' = B Ua Σa`, `D = (W − W_E) A'ᵀ` is the error of the emulator on the directions that
    the LoRA reads. The new pair is `(A', B' − D / scaling)`. Without clamp, for every x in the row space of A:
    `(W + s B'' A') x = (W_E + s B A) x`.

    `clamp` bounds, per direction, mean|D_j| by `clamp · mean|s B'_j|`; None leaves D as it is. So a direction on which
    the LoRA does nothing (B = 0) is not corrected either: an adapter without effect on the emulator has none on the
    base. Any float dtype comes in, everything is computed in float32 on A's device. Raises `NumericalError` on NaN or
    infinity, and for a scaling of 0, under which no LoRA can express a correction.
    """
    if scaling == 0 or not math.isfinite(scaling):
        raise NumericalError(
            f"the LoRA scaling is {scaling:g}: no LoRA pair can express a correction; check lora_alpha"
        )
    A, B, W, U, S, Vh = (tensor.to(A.device, torch.float32) for tensor in (A, B, W, U, S, Vh))
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NumericalError("the LoRA pair holds NaN or infinity")
    A_rows, B_rows, directions = orthonormal_rows(A, B)
    D = W @ A_rows.T - U @ (S[:, None] * (Vh @ A_rows.T))
    D, clamped = clamp_columns(D, scaling * B_rows, clamp)
    corrected = B_rows - D / scaling
    if not torch.isfinite(corrected).all():
        raise NumericalError("the weight or the emulator holds NaN or infinity, or the correction exceeds float32")
    return Correction(
        A=A_rows,
        B=corrected,
        directions=directions,
        clamped=clamped,
        delta_norm=float(D.norm()),
        update_norm=float((scaling * B_rows).norm()),
    )


def orthonormal_rows(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rewrite `B A` as `B' A'` with orthonormal rows of A': `A' (r, in)`, `B' (out, r)` and the rank of A.

    Rows beyond the rank of A are zero: the trained LoRA says nothing about them, so nothing is corrected there.
    """
    Ua, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    tolerance = sigma.max() * max(A.shape) * torch.finfo(A.dtype).eps
    directions = int((sigma > tolerance).sum())
    A_rows = torch.zeros_like(A)
    B_rows = torch.zeros_like(B)
    A_rows[:directions] = Vh[:directions]
    B_rows[:, :directions] = (B @ (Ua * sigma))[:, :directions]
    return A_rows, B_rows, directions


def clamp_columns(D: torch.Tensor, update: torch.Tensor, clamp: float | None) -> tuple[torch.Tensor, int]:
    """Scale every column of `D (out, r)` so that its mean magnitude is at most `clamp` times that of `update`'s."""
    if clamp is None:
        return D, 0
    size, limit = D.abs().mean(0), clamp * update.abs().mean(0)
    exceeds = size > limit
    factor = torch.where(exceeds, limit / torch.where(exceeds, size, torch.ones_like(size)), torch.ones_like(size))
    return D * factor, int(exceeds.sum())
