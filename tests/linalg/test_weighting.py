"""The gradient-weighted emulator against float64 references: optimality, exactness, both forms of the statistics."""

from __future__ import annotations

import pytest
import torch

from emloc_tools.errors import NumericalError
from emloc_tools.linalg.lowrank import decompose
from emloc_tools.linalg.weighting import decompose_weighted, loss_energies
from emloc_tools.records import GradientGram, Gram, LowRank

SHAPES = [(12, 20), (20, 12), (16, 16)]
TOKENS = 200
DAMPING = 0.05


class Layer:
    """A layer's weight, data and loss gradients, all float64, with directions of very different size."""

    def __init__(self, out: int, features: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.W = normal(out, features)
        self.X = normal(TOKENS, features) @ torch.diag(torch.logspace(0, -2, features, dtype=torch.float64))
        self.g = normal(TOKENS, out) @ torch.diag(torch.logspace(0, -2, out, dtype=torch.float64)) @ normal(out, out)
        self.H = self.g.T @ self.g
        self.H += DAMPING * self.H.diagonal().mean() * torch.eye(out, dtype=torch.float64)

    def gram(self, side: str = "input") -> Gram:
        rows = self.X if side == "input" else self.X @ self.W.T
        return Gram(rows.T @ rows, side, TOKENS)

    def gradient(self) -> GradientGram:
        """The form that a layer of this shape keeps."""
        side = "output" if self.W.shape[0] <= self.W.shape[1] else "input"
        rows = self.g if side == "output" else self.g @ self.W
        return GradientGram(rows.T @ rows, side, TOKENS, float((self.g**2).sum()))

    def weighted_error(self, W_E: torch.Tensor) -> float:
        """tr(H (W − W_E) XᵀX (W − W_E)ᵀ): the quantity to be minimised, from its definition."""
        rows = self.X @ (self.W - W_E).T
        return float(torch.trace(rows @ self.H @ rows.T))


def product(low_rank: LowRank) -> torch.Tensor:
    return (low_rank.U * low_rank.S).double() @ low_rank.Vh.double()


@pytest.mark.parametrize(("out", "features"), SHAPES)
def test_the_weighted_error_is_the_least_possible(out: int, features: int) -> None:
    """By Eckart–Young in coordinates where H and XᵀX are identities, computed independently of the package."""
    layer, rank = Layer(out, features), 5
    best = torch.linalg.svdvals(torch.linalg.cholesky(layer.H).T @ layer.W @ torch.linalg.qr(layer.X).R.T)[rank:]
    error = layer.weighted_error(product(decompose_weighted(layer.W, rank, layer.gram(), layer.gradient())))
    assert error == pytest.approx(float((best**2).sum()), rel=1e-5)
    unweighted = layer.weighted_error(product(decompose(layer.W, rank, layer.gram())))
    assert unweighted > 1.2 * error, "the control: without the weighting the error is larger"


@pytest.mark.parametrize(("out", "features"), SHAPES)
def test_no_small_change_of_the_factors_lowers_the_error(out: int, features: int) -> None:
    layer = Layer(out, features)
    low_rank = decompose_weighted(layer.W, 4, layer.gram(), layer.gradient())
    least = layer.weighted_error(product(low_rank))
    for _ in range(20):
        left = low_rank.U.double() * (1 + 0.01 * torch.randn(out, 4, dtype=torch.float64))
        assert layer.weighted_error((left * low_rank.S.double()) @ low_rank.Vh.double()) > least


@pytest.mark.parametrize(("out", "features"), SHAPES)
def test_the_reported_error_is_the_true_weighted_one(out: int, features: int) -> None:
    layer = Layer(out, features)
    low_rank = decompose_weighted(layer.W, 6, layer.gram(), layer.gradient())
    whole = layer.weighted_error(torch.zeros_like(layer.W))
    assert low_rank.relative_error == pytest.approx((layer.weighted_error(product(low_rank)) / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("side", ["input", "output"])
def test_either_side_of_the_data_gives_the_same_emulator(side: str) -> None:
    layer = Layer(12, 20)
    expected = product(decompose_weighted(layer.W, 5, layer.gram("input"), layer.gradient()))
    torch.testing.assert_close(
        product(decompose_weighted(layer.W, 5, layer.gram(side), layer.gradient())), expected, rtol=1e-5, atol=1e-6
    )


def test_both_forms_of_the_gradient_give_the_same_emulator() -> None:
    """A square layer may keep either; they are computed by different formulas."""
    layer = Layer(16, 16)
    outside = layer.gradient()
    rows = layer.g @ layer.W
    inside = GradientGram(rows.T @ rows, "input", TOKENS, outside.energy)
    first, second = (product(decompose_weighted(layer.W, 6, layer.gram(), form)) for form in (outside, inside))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    energies = [loss_energies(layer.W, layer.gram(), form) for form in (outside, inside)]
    torch.testing.assert_close(*energies, rtol=1e-6, atol=float(energies[0][0]) * 1e-12)


@pytest.mark.parametrize(("out", "features"), SHAPES)
def test_full_rank_gives_the_weight_and_a_prefix_is_a_smaller_emulator(out: int, features: int) -> None:
    layer = Layer(out, features)
    full = decompose_weighted(layer.W, min(out, features), layer.gram(), layer.gradient())
    torch.testing.assert_close(product(full), layer.W, rtol=1e-4, atol=1e-4)
    small = decompose_weighted(layer.W, 3, layer.gram(), layer.gradient())
    prefix = (full.U[:, :3] * full.S[:3]) @ full.Vh[:3]
    torch.testing.assert_close(prefix, product(small).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("out", "features"), SHAPES)
def test_a_gradient_that_is_the_same_everywhere_changes_nothing(out: int, features: int) -> None:
    layer = Layer(out, features)
    rows = torch.eye(out, dtype=torch.float64) if out <= features else layer.W
    isotropic = GradientGram(rows.T @ rows, "output" if out <= features else "input", out, float(out))
    for gradient in (isotropic, GradientGram(torch.zeros_like(rows.T @ rows), isotropic.side, 9, 0.0)):
        torch.testing.assert_close(
            product(decompose_weighted(layer.W, 5, layer.gram(), gradient)),
            product(decompose(layer.W, 5, layer.gram())),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize(("out", "features"), SHAPES)
def test_loss_energies_are_what_the_directions_add_to_the_weighted_error(out: int, features: int) -> None:
    """In units of squared loss: errors between ranks differ by them, after H's normalisation is taken back."""
    layer = Layer(out, features)
    gains = loss_energies(layer.W, layer.gram(), layer.gradient())
    errors = [
        layer.weighted_error(product(decompose_weighted(layer.W, rank, layer.gram(), layer.gradient())))
        for rank in (2, 3, 7)
    ]
    per_token = torch.tensor([errors[0] - errors[1], errors[1] - errors[2]], dtype=torch.float64) / TOKENS
    expected = torch.stack([gains[2], gains[3:7].sum()]) * (1 + DAMPING)
    torch.testing.assert_close(per_token, expected, rtol=1e-3, atol=0)


def test_a_weight_of_deficient_rank_is_kept_whole() -> None:
    layer = Layer(20, 12)
    layer.W = layer.W[:, :4] @ torch.randn(4, 12, dtype=torch.float64)
    low_rank = decompose_weighted(layer.W, 12, layer.gram(), layer.gradient())
    torch.testing.assert_close(product(low_rank), layer.W, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("out", "features"), [(96, 300), (2400, 300)])
def test_one_direction_of_the_gradient_far_above_all_others_costs_no_part_of_the_weight(
    out: int, features: int, dtype: torch.dtype
) -> None:
    """Then what damping leaves the other directions is 1 : 20 · out of the strongest, near float32's rounding."""
    layer = Layer(out, features)
    layer.g = torch.randn(TOKENS, 1, dtype=torch.float64) @ torch.randn(1, out, dtype=torch.float64)
    full = decompose_weighted(layer.W, min(out, features), layer.gram(), layer.gradient(), dtype=dtype)
    assert float((product(full) - layer.W).norm() / layer.W.norm()) < 1e-4


@pytest.mark.parametrize(("out", "features"), SHAPES)
def test_hardly_any_damping_is_possible_in_float32(out: int, features: int) -> None:
    layer = Layer(out, features)
    layer.g[:, 1:] = 0
    low_rank = decompose_weighted(
        layer.W.float(), 3, layer.gram(), layer.gradient(), damping=1e-12, dtype=torch.float32
    )
    assert torch.isfinite(product(low_rank)).all()
    first = (layer.W - product(low_rank))[0] @ layer.X.T
    assert float(first.norm() / (layer.X @ layer.W[0]).norm()) < 1e-3, "all that counts is the first output"


def test_values_that_are_not_finite_are_named() -> None:
    for out, features in SHAPES:
        layer = Layer(out, features)
        gradient = layer.gradient()
        bad = GradientGram(gradient.matrix / 0, gradient.side, TOKENS, gradient.energy)
        with pytest.raises(NumericalError, match="moments of the gradient hold NaN"):
            decompose_weighted(layer.W, 3, layer.gram(), bad)
        layer.W[0, 0] = float("nan")
        with pytest.raises(NumericalError, match="the weight holds NaN"):
            decompose_weighted(layer.W, 3, layer.gram(), gradient)


def test_damping_must_be_positive() -> None:
    layer = Layer(12, 20)
    with pytest.raises(ValueError, match="damping 0"):
        decompose_weighted(layer.W, 3, layer.gram(), layer.gradient(), damping=0.0)
