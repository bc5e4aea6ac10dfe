"""The best low-rank emulator of a linear layer on its calibration data.

Minimising ‖X Wᵀ − X W_Eᵀ‖ over matrices of rank k gives `W_E = U Uᵀ W` with U the top-k eigenvectors of `YᵀY`,
`Y = X Wᵀ`: the principal components of the layer's own outputs (Eckart–Young on Y). Nothing is inverted, so a
rank-deficient calibration set needs no damping. The result equals that of whitening W with the square root
of `XᵀX` and taking an SVD (EMLoC, arXiv 2506.12015, section 3.1), at the cost of one eigendecomposition of the
layer's smaller side.
"""

from __future__ import annotations

import torch

from emloc_tools.errors import NumericalError
from emloc_tools.records import Gram, LowRank

S_FLOOR = 1e-3  # relative to S[0]; keeps the rows of Vh finite in float16 and does not change W_E


def decompose(W: torch.Tensor, rank: int, gram: Gram | None = None, *, dtype: torch.dtype = torch.float64) -> LowRank:
    """The emulator of `W (out, in)` with `rank` directions, `1 <= rank <= min(out, in)`.

    Without `gram` it is the truncated SVD of W. All products and eigendecompositions run in `dtype` on W's
    device. A direction without calibration energy is used only after every direction that has some; then the
    largest remaining part of W decides, so that the full rank reproduces W.

    Returns float32 factors. Raises `NumericalError` if W or the Gram is not finite or nothing converges.
    """
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank {rank} is outside 1..{min(W.shape)}")
    if not torch.isfinite(W).all():
        raise NumericalError("the weight holds NaN or infinity")
    W = W.to(dtype)
    energies, U = principal_directions(W, gram, dtype=dtype)
    energetic = min(rank, count_energetic(energies))
    U = U[:, :rank] if energetic == rank else complete_directions(U[:, :energetic], W, rank)
    S, floored = _magnitudes(energies[:rank], energetic, tokens=gram.tokens if gram else 1)
    Vh = (U.T @ W) / S[:, None]
    tokens = gram.tokens if gram else 1
    return LowRank(
        U=U.float(),
        S=S.float(),
        Vh=Vh.float(),
        energies=(energies / tokens).double().cpu(),
        energetic=energetic,
        floored=floored,
    )


def principal_directions(
    W: torch.Tensor, gram: Gram | None, *, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output energies and directions of `W (out, in)` on the calibration data, most energetic first.

    Returns `energies (m,)`, the eigenvalues of `W XᵀX Wᵀ` (summed over tokens, never negative), and
    `U (out, m)`, `m = min(out, in)`, both in `dtype`. Columns of U whose energy is zero may be zero.
    """
    m = min(W.shape)
    if gram is not None and gram.side == "output":
        energies, U = _eigh_descending(gram.matrix.to(W.device, dtype))
        return energies[:m], U[:, :m]
    W = W.to(dtype)
    G = None if gram is None else gram.matrix.to(W.device, dtype)
    if W.shape[0] <= W.shape[1]:
        return _eigh_descending(W @ W.T if G is None else W @ G @ W.T)
    # out > in: with G = C Cᵀ the same energies belong to the smaller matrix (W C)ᵀ(W C).
    M = W if G is None else W @ _square_root(G)
    energies, V = _eigh_descending(M.T @ M)
    return energies, _normalised_columns(M @ V)


def count_energetic(energies: torch.Tensor) -> int:
    """How many of the descending `energies` stand above the noise of a float32 Gram: epsilon times their sum."""
    return int((energies > torch.finfo(torch.float32).eps * energies.sum()).sum())


def complete_directions(U: torch.Tensor, W: torch.Tensor, rank: int) -> torch.Tensor:
    """Extend the orthonormal `U (out, k)` to `(out, rank)` by the top left singular vectors of `(I − U Uᵀ) W`."""
    R = W - U @ (U.T @ W)
    if R.shape[0] <= R.shape[1]:
        _, candidates = _eigh_descending(R @ R.T)
    else:
        _, V = _eigh_descending(R.T @ R)
        candidates = _normalised_columns(R @ V)
    candidates = candidates - U @ (U.T @ candidates)
    # Householder QR also completes the basis where W itself has nothing left (zero columns).
    Q, _ = torch.linalg.qr(torch.cat([U, candidates[:, : rank - U.shape[1]]], dim=1))
    return torch.cat([U, Q[:, U.shape[1] :]], dim=1)


def truncate(
    U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The emulator of lower rank: factors are sorted, so it is a prefix of the larger one (views, no copies)."""
    if not 1 <= rank <= S.numel():
        raise ValueError(f"rank {rank} is outside 1..{S.numel()}")
    return U[:, :rank], S[:rank], Vh[:rank]


def _magnitudes(energies: torch.Tensor, energetic: int, *, tokens: int) -> tuple[torch.Tensor, int]:
    """S: root mean square output along each direction, floored; and how many entries the floor raised."""
    S = (energies / tokens).sqrt()
    S[energetic:] = 0
    floor = float(S[0]) * S_FLOOR or 1.0
    return S.clamp(min=floor), int((floor > S).sum())


def _square_root(G: torch.Tensor) -> torch.Tensor:
    """C with `G = C Cᵀ`, from the eigendecomposition of the positive semidefinite G."""
    eigenvalues, Q = _eigh_descending(G)
    return Q * eigenvalues.sqrt()


def _normalised_columns(M: torch.Tensor) -> torch.Tensor:
    """M with columns of unit length; a zero column stays zero."""
    norms = M.norm(dim=0)
    return M / torch.where(norms > 0, norms, torch.ones_like(norms))


def _eigh_descending(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, clamped at zero, and eigenvectors of the symmetric positive semidefinite A, largest first."""
    if not torch.isfinite(A).all():
        raise NumericalError("the second moments hold NaN or infinity")
    try:
        eigenvalues, Q = torch.linalg.eigh((A + A.T) / 2)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"the eigendecomposition of a {tuple(A.shape)} matrix failed: {error}") from error
    return eigenvalues.flip(0).clamp(min=0), Q.flip(1)
