"""The emulator of one layer against float64 references: the paper's algorithm, competitors, the spectral tail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc_tools.linalg.gram import accumulate
from emloc_tools.linalg.lowrank import decompose, output_energies, principal_directions, truncate
from emloc_tools.records import Gram, Side
from tests.linalg.problems import (
    SHAPES,
    dense,
    gram,
    inputs,
    output_error,
    property_test,
    truncated_svd,
    weight,
)

SIDES: list[Side] = ["input", "output"]
RANK = 5


def papers_emulator(W: torch.Tensor, X: torch.Tensor, rank: int) -> torch.Tensor:
    """EMLoC, section 3.1: whiten by the root of XᵀX, truncate the SVD, map back. For X of full column rank."""
    eigenvalues, Q = torch.linalg.eigh(X.T @ X)
    root = Q @ torch.diag(eigenvalues.sqrt()) @ Q.T
    return truncated_svd(W @ root, rank) @ torch.linalg.inv(root)


def refined(W_E: torch.Tensor, W: torch.Tensor, X: torch.Tensor, rank: int) -> torch.Tensor:
    """W_E after 200 gradient steps (L-BFGS) on ‖X (W − P Q)ᵀ‖² over P (out, rank) and Q (rank, in)."""
    U, S, Vh = torch.linalg.svd(W_E, full_matrices=False)
    P = (U[:, :rank] * S[:rank].sqrt()).contiguous().requires_grad_()
    Q = (S[:rank].sqrt()[:, None] * Vh[:rank]).contiguous().requires_grad_()
    optimizer = torch.optim.LBFGS([P, Q], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (X @ (W - P @ Q).T).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (P @ Q).detach()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_emulator_is_that_of_the_papers_algorithm(shape: tuple[int, int], side: Side, device: str) -> None:
    W, X = weight(*shape), inputs(100, shape[1])
    W_E = dense(decompose(W.to(device), RANK, gram(X, W, side)))
    reference = papers_emulator(W, X, RANK)
    assert output_error(W_E, W, X) == pytest.approx(output_error(reference, W, X), rel=1e-6)
    torch.testing.assert_close(W_E, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_competitor_of_the_same_rank_has_a_smaller_output_error(shape: tuple[int, int]) -> None:
    W, X = weight(*shape), inputs(100, shape[1])
    W_E = dense(decompose(W, RANK, gram(X, W, "input")))
    ours, plain = output_error(W_E, W, X), output_error(truncated_svd(W, RANK), W, X)
    assert ours < 0.9 * plain
    # The search is able to improve what can be improved, and still does not get below ours.
    from_plain = output_error(refined(truncated_svd(W, RANK), W, X, RANK), W, X)
    assert ours * (1 - 1e-9) < from_plain < 0.95 * plain
    assert output_error(refined(W_E, W, X, RANK), W, X) == pytest.approx(ours, rel=1e-9)
    for seed in range(20):
        # The best that any W' can do whose outputs lie in a random space of RANK dimensions: project onto it.
        basis, _ = torch.linalg.qr(weight(shape[0], RANK, seed=seed))
        assert output_error(basis @ basis.T @ W, W, X) > ours


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reported_error_is_the_true_one_and_the_discarded_tail(shape: tuple[int, int], side: Side) -> None:
    W, X = weight(*shape), inputs(100, shape[1])
    tail = torch.linalg.svdvals(X @ W.T)[: min(shape)].square()
    for rank in range(1, min(shape) + 1):
        low_rank = decompose(W, rank, gram(X, W, side))
        expected = float((tail[rank:].sum() / tail.sum()).sqrt())
        assert low_rank.relative_error == pytest.approx(expected, abs=1e-7)
        assert output_error(dense(low_rank), W, X) == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(low_rank.energies, tail / len(X))


@pytest.mark.parametrize("shape", SHAPES)
def test_input_and_output_grams_give_the_same_emulator(shape: tuple[int, int]) -> None:
    W, X = weight(*shape), inputs(100, shape[1])
    by_input, by_output = (dense(decompose(W, RANK, gram(X, W, side))) for side in SIDES)
    torch.testing.assert_close(by_input, by_output, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_directions_are_orthonormal_whatever_their_energy(
    shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    W = weight(*shape)
    X = inputs(200, shape[1]) + 3000 * torch.randn(200, 1, dtype=torch.float64) * weight(1, shape[1], seed=5)
    _, U = principal_directions(W.to(device), gram(X, W, "input"), dtype=dtype)
    identity = torch.eye(min(shape), dtype=dtype, device=device)
    epsilon = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(U.T @ U, identity, rtol=0, atol=epsilon)


def test_without_orthogonalisation_weak_directions_would_not_be_orthogonal_in_float32() -> None:
    W = weight(40, 24)
    X = inputs(200, 24) + 3000 * torch.randn(200, 1, dtype=torch.float64) * weight(1, 24, seed=5)
    eigenvalues, Q = torch.linalg.eigh((X.T @ X).float())
    M = W.float() @ (Q * eigenvalues.clamp(min=0).sqrt())
    _, V = torch.linalg.eigh(M.T @ M)
    U = torch.nn.functional.normalize(M @ V, dim=0)
    assert float((U.T @ U - torch.eye(24)).abs().max()) > 0.01


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_s_is_the_root_mean_square_output_along_each_direction(shape: tuple[int, int], side: Side) -> None:
    W, X = weight(*shape), inputs(100, shape[1])
    low_rank = decompose(W, RANK, gram(X, W, side))
    coefficients = X @ W.T @ low_rank.U.double()
    torch.testing.assert_close(low_rank.S.double(), coefficients.square().mean(0).sqrt(), rtol=1e-6, atol=0)
    assert (low_rank.S[:-1] >= low_rank.S[1:]).all()
    assert low_rank.floored == 0


def test_without_data_the_emulator_is_the_truncated_svd(device: str) -> None:
    for shape in SHAPES:
        W = weight(*shape)
        low_rank = decompose(W.to(device), RANK)
        torch.testing.assert_close(dense(low_rank), truncated_svd(W, RANK), rtol=0, atol=1e-6)
        torch.testing.assert_close(low_rank.energies, torch.linalg.svdvals(W).square())
        assert low_rank.energetic == RANK


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prefix_of_the_factors_is_the_smaller_emulator(shape: tuple[int, int], side: Side) -> None:
    W, X = weight(*shape), inputs(7, shape[1])
    large = decompose(W, 10, gram(X, W, side))  # more directions than tokens: the filled-in ones are sorted too
    for rank in range(1, 11):
        U, S, Vh = truncate(large.U, large.S, large.Vh, rank)
        small = decompose(W, rank, gram(X, W, side))
        torch.testing.assert_close(U @ torch.diag(S) @ Vh, dense(small).float(), rtol=0, atol=1e-6)
    for rank in (0, 11):
        with pytest.raises(ValueError, match=f"rank {rank} is outside 1..10"):
            truncate(large.U, large.S, large.Vh, rank)


def test_energies_alone_are_those_that_come_with_the_directions(device: str) -> None:
    for shape in SHAPES:
        W, X = weight(*shape), inputs(100, shape[1])
        for data in (None, gram(X, W, "input"), gram(X, W, "output")):
            energies, _ = principal_directions(W.to(device), data)
            torch.testing.assert_close(output_energies(W.to(device), data), energies)


@property_test
@given(data=st.data())
def test_every_shape_amount_of_data_and_rank_gives_a_projection_that_reports_its_error(data: st.DataObject) -> None:
    out_features, in_features = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    tokens, seed = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 99))
    rank = data.draw(st.integers(1, min(out_features, in_features)))
    W, X = weight(out_features, in_features, seed=seed), inputs(tokens, in_features, seed=seed + 100)
    low_rank = decompose(W, rank, gram(X, W, data.draw(st.sampled_from(SIDES))))
    U = low_rank.U.double()
    torch.testing.assert_close(U.T @ U, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(dense(low_rank), U @ U.T @ W, rtol=0, atol=1e-6)
    assert (low_rank.S > 0).all()
    assert (low_rank.S[:-1] >= low_rank.S[1:]).all()
    energies = torch.linalg.svdvals(X @ W.T).square()
    noise = 2**-23 * energies.sum()  # the documented threshold; a factor of two leaves room at its edge
    assert (energies[:rank] > 2 * noise).sum() <= low_rank.energetic <= (energies[:rank] > noise / 2).sum()
    if tokens:
        error = output_error(dense(low_rank), W, X)
        assert error == pytest.approx(low_rank.relative_error, abs=1e-6)
        assert error < output_error(truncated_svd(W, rank), W, X) + 1e-6
    if rank == min(out_features, in_features):
        torch.testing.assert_close(dense(low_rank), W, rtol=0, atol=1e-6)


def test_the_arguments_are_not_modified() -> None:
    W, X = weight(12, 20), inputs(7, 20)
    for data in (gram(X, W, "input"), gram(X, W, "output")):
        before = W.clone(), data.matrix.clone()
        decompose(W, 10, data)
        assert torch.equal(W, before[0])
        assert torch.equal(data.matrix, before[1])


def test_float32_sums_of_real_data_give_the_float64_emulator_for_either_precision(device: str) -> None:
    W, X = weight(96, 64), inputs(500, 64)
    G = torch.zeros(64, 64)
    for batch in X.split(7):
        accumulate(G, batch)
    best = output_error(papers_emulator(W, X, 20), W, X)
    for dtype, excess in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        low_rank = decompose(W.to(device), 20, Gram(G, "input", len(X)), dtype=dtype)
        assert output_error(dense(low_rank), W, X) == pytest.approx(best, rel=excess)
        assert low_rank.relative_error == pytest.approx(best, rel=1e-5)
