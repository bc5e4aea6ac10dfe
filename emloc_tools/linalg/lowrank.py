"""The best low-rank emulator of a linear layer on its calibration data.

Minimising ‖X Wᵀ − X W_Eᵀ‖ over matrices of rank k gives `W_E = U Uᵀ W` with U the top-k eigenvectors of `YᵀY`,
`Y = X Wᵀ`: the principal components of the layer's own outputs (Eckart–Young on Y). Nothing is inverted, so a
rank-deficient calibration set needs no damping. The result equals that of whitening W with the square root
of `XᵀX` and taking an SVD (EMLoC, arXiv 2506.12015, section 3.1), at the cost of one eigendecomposition of the
layer's smaller side. `docs/mathematics.md` derives all of it.

W and the Gram are brought to unit scale by powers of two, which is exact: the squares in the Grams then neither
overflow nor vanish in float32, whatever the scale of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from emloc_tools.errors import NumericalError
from emloc_tools.records import Gram, LowRank

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # public, but missing from its __all__
S_FLOOR = 1e-3  # of S[0]: what a direction passes on, x Vhᵀ, stays within 1000 times that of S[0]'s, also in float16
VH_LIMIT = 4096.0  # no value of Vh above it, however small the data: float16 ends at 65504


def decompose(W: torch.Tensor, rank: int, gram: Gram | None = None, *, dtype: torch.dtype = torch.float64) -> LowRank:
    """The emulator of `W (out, in)` with `rank` directions, `1 <= rank <= min(out, in)`.

    Without `gram` it is the truncated SVD of W. All products and eigendecompositions run in `dtype` (float64 or
    float32) on W's device. A direction without calibration energy is used only after every direction that has some;
    then the largest remaining part of W decides, so that the full rank reproduces W.

    Returns float32 factors. Raises `NumericalError` if W or the Gram is not finite or nothing converges.
    """
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank {rank} is outside 1..{min(W.shape)}")
    W, unit = _unit_scale(W, dtype, "the weight")
    energies, U = _directions(W, unit, gram, rank)
    energetic = min(rank, count_energetic(energies, noise_level(dtype, float32_sums=gram is not None)))
    if energetic < rank:
        U = complete_directions(U[:, :energetic], W, rank)
    energies = energies / (max(1, gram.tokens) if gram else 1)
    projections = unit * (U.T @ W)
    S, floored = _magnitudes(energies[:rank], energetic, largest=float(projections.abs().max()))
    return LowRank(
        U=U.float(),
        S=S,
        Vh=(projections / S[:, None]).float(),
        energies=energies.cpu(),
        energetic=energetic,
        floored=floored,
    )


def principal_directions(
    W: torch.Tensor, gram: Gram | None, *, rank: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output energies of `W (out, in)` on the calibration data, and its `rank` most energetic directions.

    Returns `energies (m,)`, `m = min(out, in)`: the eigenvalues of `W XᵀX Wᵀ` (summed over tokens, descending, never
    negative, float64), and `U (out, rank)` with orthonormal columns in `dtype`; all m of them without `rank`.
    """
    W, unit = _unit_scale(W, dtype, "the weight")
    return _directions(W, unit, gram, min(W.shape) if rank is None else rank)


def output_energies(W: torch.Tensor, gram: Gram | None, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The energies of `principal_directions` alone, several times faster without their directions."""
    W, unit = _unit_scale(W, dtype, "the weight")
    A, _, scale = _eigenproblem(W, unit, gram)
    with _readable_failure(A):
        energies = torch.linalg.eigvalsh(A)
    return _energies(energies.flip(0)[: min(W.shape)], scale)


def count_energetic(energies: torch.Tensor, noise: float) -> int:
    """How many of the descending `energies` are above `noise` times their sum."""
    return int((energies > noise * energies.sum()).sum())


def noise_level(dtype: torch.dtype, *, float32_sums: bool) -> float:
    """The part of the total energy that rounding may leave on a direction that has none.

    Measured on rank-deficient data with one dominant direction: sums in float32 leave up to 0.13 of float32's epsilon
    on a direction, the eigensolver up to 1.1 of the epsilon of the `dtype` that it runs in.
    """
    solver = 4 * torch.finfo(dtype).eps
    return max(solver, torch.finfo(torch.float32).eps) if float32_sums else solver


def complete_directions(U: torch.Tensor, W: torch.Tensor, rank: int) -> torch.Tensor:
    """Extend the orthonormal `U (out, k)` to `(out, rank)` by the top left singular vectors of `(I − U Uᵀ) W`."""
    R = W - U @ (U.T @ W)
    if R.shape[0] <= R.shape[1]:
        _, candidates = _eigh_descending(R @ R.T)
    else:
        _, V = _eigh_descending(R.T @ R)
        candidates = R @ V
    # Householder QR also completes the basis where W itself has nothing left (zero columns).
    Q, _ = torch.linalg.qr(torch.cat([U, candidates[:, : rank - U.shape[1]]], dim=1))
    return torch.cat([U, Q[:, U.shape[1] :]], dim=1)


def truncate(
    U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The emulator of lower rank: factors are sorted, so it is a prefix of the larger one (views, no copies).

    The factors of a stack of experts have one more dimension in front.
    """
    if not 1 <= rank <= S.shape[-1]:
        raise ValueError(f"rank {rank} is outside 1..{S.shape[-1]}")
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def _directions(W: torch.Tensor, unit: float, gram: Gram | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All energies (float64) and the top `rank` directions (W's dtype) of the layer `unit · W`."""
    A, M, scale = _eigenproblem(W, unit, gram)
    eigenvalues, vectors = _eigh_descending(A)
    energies = _energies(eigenvalues[: min(W.shape)], scale)
    if M is None:
        return energies, vectors[:, :rank]
    # Columns of M V are orthogonal in exact arithmetic only: in float32 weak directions lose it (angles of 0.2).
    # QR takes the columns in order, so it mends the weak directions and leaves the strong ones.
    U, _ = torch.linalg.qr(M @ vectors[:, :rank])
    return energies, U


def _eigenproblem(W: torch.Tensor, unit: float, gram: Gram | None) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """The smaller symmetric matrix A whose eigenvalues, times the returned scale, are the energies of `unit · W`.

    With M None the eigenvectors of `A (out, out)` are the directions; otherwise `M (out, in)` maps those of
    `A = MᵀM (in, in)` to them.
    """
    G, scale = None, unit * unit
    if gram is not None:
        G, gram_unit = _unit_scale(gram.matrix.to(W.device), W.dtype, "the Gram matrix")
        if gram.side == "output":
            return G, None, gram_unit
        scale *= gram_unit
    if W.shape[0] <= W.shape[1]:
        return (W @ W.T if G is None else W @ G @ W.T), None, scale
    M = W if G is None else W @ _square_root(G)
    return M.T @ M, M, scale


def _magnitudes(energies: torch.Tensor, energetic: int, *, largest: float) -> tuple[torch.Tensor, int]:
    """S (float32): root mean square output along each direction, floored; and how many entries the floor raised.

    `largest` is the largest magnitude in `Uᵀ W = diag(S) Vh`.
    """
    S = energies.sqrt()
    S[energetic:] = 0
    floor = max(float(S[0]) * S_FLOOR, largest / VH_LIMIT) or 1.0  # 1 for a weight of zeros
    return S.clamp(min=floor).float(), int((floor > S).sum())


def _square_root(G: torch.Tensor) -> torch.Tensor:
    """C with `G = C Cᵀ`, from the eigendecomposition of the positive semidefinite G."""
    eigenvalues, Q = _eigh_descending(G)
    return Q * eigenvalues.clamp(min=0).sqrt()


def _energies(eigenvalues: torch.Tensor, scale: float) -> torch.Tensor:
    """Eigenvalues as energies: float64, at their true scale, rounding below zero removed."""
    return eigenvalues.double().clamp(min=0) * scale


def _unit_scale(A: torch.Tensor, dtype: torch.dtype, what: str) -> tuple[torch.Tensor, float]:
    """`A / c` in `dtype` and the power of two c that brings its largest magnitude to 0.5–1 (1 for zeros)."""
    low, high = A.aminmax()
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        raise NumericalError(f"{what} holds NaN or infinity")
    c = math.ldexp(1.0, math.frexp(largest)[1])
    # Divided in the wider of the two types, so that neither the values nor the quotients leave its range.
    return (A.to(torch.promote_types(A.dtype, dtype)) / c).to(dtype), c


def _eigh_descending(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of the symmetric A (of which the lower triangle is read), largest first."""
    with _readable_failure(A):
        eigenvalues, Q = torch.linalg.eigh(A)
    return eigenvalues.flip(0), Q.flip(1)


@contextmanager
def _readable_failure(A: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except LinAlgError as error:
        raise NumericalError(f"the eigendecomposition of a {tuple(A.shape)} matrix failed: {error}") from error
