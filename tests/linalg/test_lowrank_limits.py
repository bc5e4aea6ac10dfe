"""The emulator where data is deficient, scales are extreme, storage is coarse, or the input is unusable."""

from __future__ import annotations

import pytest
import torch

from emloc_tools.errors import NumericalError
from emloc_tools.linalg.gram import accumulate
from emloc_tools.linalg.lowrank import decompose
from emloc_tools.records import Gram, Side
from tests.linalg.problems import SHAPES, dense, gram, inputs, output_error, truncated_svd, weight

SIDES: list[Side] = ["input", "output"]
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "directions"), [("full rank", 12), ("four tokens", 4), ("constant", 1), ("zeros", 0)])
def test_the_full_rank_reproduces_the_weight_whatever_the_data(
    name: str, directions: int, shape: tuple[int, int], side: Side, device: str
) -> None:
    X = {
        "full rank": inputs(100, shape[1]),
        "four tokens": inputs(4, shape[1]),
        "constant": inputs(1, shape[1]).expand(50, -1),
        "zeros": torch.zeros(50, shape[1], dtype=torch.float64),
    }[name]
    W, full = weight(*shape), min(shape)
    for dtype, tolerance in zip(DTYPES, (1e-6, 1e-5), strict=True):
        low_rank = decompose(W.to(device), full, gram(X, W, side), dtype=dtype)
        torch.testing.assert_close(dense(low_rank), W, rtol=0, atol=tolerance)
        assert low_rank.energetic == (full if name == "full rank" else directions)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_directions_beyond_the_data_keep_the_most_of_what_is_left_of_the_weight(
    shape: tuple[int, int], side: Side
) -> None:
    W, X = weight(*shape), inputs(4, shape[1])
    low_rank = decompose(W, 7, gram(X, W, side))
    assert low_rank.energetic == 4
    assert output_error(dense(low_rank), W, X) < 1e-6
    Y_basis, _ = torch.linalg.qr((X @ W.T).T)
    rest = W - Y_basis @ Y_basis.T @ W
    least = torch.linalg.svdvals(rest)[3:].square().sum().sqrt()
    assert float((W - dense(low_rank)).norm()) == pytest.approx(float(least), rel=1e-6)
    # Control: three random directions in their place keep the calibrated outputs too, but less of the weight.
    random, _ = torch.linalg.qr(torch.cat([Y_basis, weight(shape[0], 3, seed=9)], dim=1))
    assert float((W - random @ random.T @ W).norm()) > 1.05 * float(least)


@pytest.mark.parametrize("side", SIDES)
def test_data_of_zeros_gives_the_truncated_svd_and_no_error_on_the_data(side: Side) -> None:
    W = weight(12, 20)
    low_rank = decompose(W, 5, gram(torch.zeros(50, 20, dtype=torch.float64), W, side))
    torch.testing.assert_close(dense(low_rank), truncated_svd(W, 5), rtol=0, atol=1e-6)
    assert (low_rank.energetic, low_rank.floored, low_rank.relative_error) == (0, 5, 0)


def test_a_gram_of_no_tokens_is_treated_as_data_of_zeros() -> None:
    W = weight(12, 20)
    low_rank = decompose(W, 5, Gram(torch.zeros(20, 20), "input", 0))
    assert torch.equal(low_rank.energies, torch.zeros(12, dtype=torch.float64))
    torch.testing.assert_close(dense(low_rank), truncated_svd(W, 5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_zeros_has_an_emulator_of_zeros_with_orthonormal_directions(shape: tuple[int, int]) -> None:
    W, X = torch.zeros(shape, dtype=torch.float64), inputs(50, shape[1])
    for data in (None, gram(X, W, "input"), gram(X, W, "output")):
        low_rank = decompose(W, 5, data)
        assert torch.equal(dense(low_rank), W)
        assert torch.equal(low_rank.S, torch.ones(5))
        torch.testing.assert_close(low_rank.U.T @ low_rank.U, torch.eye(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_scale_of_weight_and_data_only_scales_the_emulator(
    scale: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W, X = weight(*shape).float(), inputs(100, shape[1])
    G, scaled_W = gram(X, W.double(), "input"), scale * W
    expected = decompose(W, 5, G, dtype=dtype)
    for low_rank, weight_scale, output_scale in (
        (decompose(scaled_W, 5, G, dtype=dtype), scale, scale),
        (decompose(scaled_W, 5, gram(X, scaled_W.double(), "output"), dtype=dtype), scale, scale),
        (decompose(W, 5, Gram(scale * G.matrix, "input", G.tokens), dtype=dtype), 1.0, scale**0.5),
    ):
        torch.testing.assert_close(dense(low_rank) / weight_scale, dense(expected), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(low_rank.energies / output_scale**2, expected.energies, rtol=1e-5, atol=1e-7)
        assert low_rank.relative_error == pytest.approx(expected.relative_error, rel=1e-5)
        assert low_rank.energetic == 5
    # Control: at these scales the squares that a Gram is made of do not exist in float32.
    squares = (scale * W) @ (scale * W).T
    assert (squares == 0).all() or not torch.isfinite(squares).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_without_data_only_rounding_counts_as_nothing(shape: tuple[int, int]) -> None:
    """W itself is exact, so its weak directions count far below the level at which those of a Gram would."""
    integers = torch.randint(-9, 10, (shape[0], 5)).double() @ torch.randint(-9, 10, (5, shape[1])).double()
    assert decompose(integers, 12).energetic == 5
    assert decompose(integers.float(), 12, dtype=torch.float32).energetic == 5
    graded = torch.zeros(shape, dtype=torch.float64)
    graded.diagonal().copy_(10.0 ** -(torch.arange(min(shape)) / 2))  # down to 3e-6, squares to 1e-11 of the total
    assert decompose(graded, 12).energetic == 12


@pytest.mark.parametrize("side", SIDES)
def test_a_bfloat16_weight_is_taken_at_its_exact_value(side: Side, device: str) -> None:
    W, X = weight(12, 20).bfloat16().to(device), inputs(100, 20)
    data = gram(X, W.double().cpu(), side)
    low_rank, reference = decompose(W, 5, data), decompose(W.double(), 5, data)
    for name in ("U", "S", "Vh", "energies"):
        assert torch.equal(getattr(low_rank, name), getattr(reference, name))


def test_an_output_gram_of_bfloat16_outputs_costs_less_than_1e_5() -> None:
    W, X = weight(24, 64), inputs(2000, 64)
    G = torch.zeros(24, 24)
    accumulate(G, (X @ W.T).bfloat16())
    found = output_error(dense(decompose(W, 8, Gram(G, "output", len(X)))), W, X)
    best = output_error(dense(decompose(W, 8, gram(X, W, "input"))), W, X)
    assert best <= found * (1 + 1e-9)
    assert found == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
@pytest.mark.parametrize("dominance", [0, 100])
def test_rounding_of_float32_sums_is_not_taken_for_data(
    dominance: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = weight(*shape)
    X = inputs(20, shape[1], decay=0.3) + dominance * weight(20, 1, seed=3) * weight(1, shape[1], seed=4)
    for side, Z in (("input", X), ("output", X @ W.T)):
        G = torch.zeros(Z.shape[1], Z.shape[1])
        for batch in Z.float().split(3):
            accumulate(G, batch)
        assert torch.linalg.matrix_rank(G.double(), rtol=1e-13) > 20  # rounding made it look richer than 20 tokens
        assert decompose(W, 30, Gram(G, side, 20), dtype=dtype).energetic == 20


@pytest.mark.parametrize(("tokens", "scale"), [(4, 1.0), (100, 1e-6)])
def test_float16_factors_stay_finite_because_s_is_floored(tokens: int, scale: float) -> None:
    W, X = weight(16, 16), scale * inputs(tokens, 16)
    low_rank = decompose(W, 12, gram(X, W, "input"))
    assert low_rank.floored > 0
    assert low_rank.Vh.half().isfinite().all()
    assert float(low_rank.Vh.abs().max()) <= 4096 * (1 + 1e-6)
    assert float(low_rank.S[-1]) >= float(low_rank.S[0]) / 1000 * (1 - 1e-6)
    # W_E is that of the directions alone: what S gained, Vh lost.
    U = low_rank.U.double()
    torch.testing.assert_close(dense(low_rank), U @ U.T @ W, rtol=0, atol=1e-6)
    # Control: with S as the data has it, the rows of Vh leave the range of float16.
    true_S = (X @ W.T @ U).square().mean(0).sqrt()
    assert (low_rank.S.double() > true_S * (1 + 1e-6)).sum() == low_rank.floored
    assert not (U.T @ W / true_S[:, None]).half().isfinite().all()


@pytest.mark.parametrize("rank", [0, 13])
def test_a_rank_that_the_shape_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is outside 1..12"):
        decompose(weight(12, 20), rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(value: float, device: str) -> None:
    W, X = weight(12, 20), inputs(50, 20)
    for side in SIDES:
        data = gram(X, W, side)
        data.matrix[1, 2] = value
        with pytest.raises(NumericalError, match="the Gram matrix holds NaN or infinity"):
            decompose(W.to(device), 5, data)
    W[3, 4] = value
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(NumericalError, match="the weight holds NaN or infinity"):
            decompose(W.to(device, dtype), 5)
