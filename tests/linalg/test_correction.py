"""The corrected LoRA against what it must do, and against the paper's rule computed column by column in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc_tools.errors import NumericalError
from emloc_tools.linalg.correction import CLAMP, Correction, correct_lora
from tests.linalg.problems import property_test, weight

OUT, IN, R, K = 14, 18, 4, 5


@dataclass(frozen=True)
class Trained:
    """A layer, its emulator and a LoRA trained on it; float64."""

    A: torch.Tensor
    B: torch.Tensor
    W: torch.Tensor
    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    @property
    def emulator(self) -> torch.Tensor:
        return self.U @ torch.diag(self.S) @ self.Vh

    def correct(self, scaling: float, clamp: float | None = None, *, device: str = "cpu") -> Correction:
        A, B, W, U, S, Vh = (tensor.float().to(device) for tensor in vars(self).values())
        return correct_lora(A, B, scaling, W, U, S, Vh, clamp)


def trained(out_features: int = OUT, in_features: int = IN, r: int = R, *, lora: float = 0.1, seed: int = 0) -> Trained:
    """An emulator of rank 5 that misses much of W, and a random LoRA pair of size `lora`."""
    W = weight(out_features, in_features, seed=seed)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    A, B = weight(r, in_features, seed=seed + 1), lora * weight(out_features, r, seed=seed + 2)
    return Trained(A, B, W, U[:, :K], S[:K], Vh[:K])


def update(correction: Correction) -> torch.Tensor:
    return correction.B.double().cpu() @ correction.A.double().cpu()


@pytest.mark.parametrize("alpha_over_r", [8 / 4, 4 / 4, 8 / 4**0.5, 3 / 4, -0.5])
def test_on_what_the_lora_reads_the_base_becomes_the_trained_emulator(alpha_over_r: float, device: str) -> None:
    layer, s = trained(), alpha_over_r
    corrected = layer.W + s * update(layer.correct(s, device=device))
    target = layer.emulator + s * layer.B @ layer.A
    x = layer.A.T @ torch.randn(R, 30, dtype=torch.float64)
    torch.testing.assert_close(corrected @ x, target @ x, rtol=0, atol=1e-5)
    # Control: without the correction they differ visibly there.
    assert float(((layer.W + s * layer.B @ layer.A - target) @ x).abs().max()) > 0.1


def test_off_the_row_space_of_a_the_base_keeps_its_outputs() -> None:
    layer = trained()
    x = torch.randn(IN, 30, dtype=torch.float64)
    x -= torch.linalg.pinv(layer.A) @ layer.A @ x
    torch.testing.assert_close(update(layer.correct(2.0)) @ x, torch.zeros(OUT, 30).double(), rtol=0, atol=1e-5)
    assert float((layer.W @ x).abs().max()) > 1  # these inputs are not small


@pytest.mark.parametrize(("s", "agrees"), [(1.0, True), (2.0, False), (0.5, False)])
def test_a_correction_without_the_scaling_is_right_for_alpha_equal_to_r_only(s: float, agrees: bool) -> None:
    layer = trained()
    Ua, sigma, A_rows = torch.linalg.svd(layer.A, full_matrices=False)
    without_s = layer.B @ Ua @ torch.diag(sigma) - (layer.W - layer.emulator) @ A_rows.T
    target = (layer.emulator + s * layer.B @ layer.A) @ A_rows.T
    by_released_code = (layer.W + s * without_s @ A_rows) @ A_rows.T
    by_ours = (layer.W + s * update(layer.correct(s))) @ A_rows.T
    torch.testing.assert_close(by_ours, target, rtol=0, atol=1e-5)
    assert torch.allclose(by_released_code, target, rtol=0, atol=1e-5) == agrees


@pytest.mark.parametrize("clamp", [None, CLAMP])
def test_an_exact_emulator_leaves_the_lora_as_it_is(clamp: float | None) -> None:
    layer = trained()
    exact = Trained(layer.A, layer.B, layer.emulator, layer.U, layer.S, layer.Vh)
    corrected = exact.correct(2.0, clamp)
    torch.testing.assert_close(update(corrected), layer.B @ layer.A, rtol=0, atol=1e-6)
    assert corrected.delta_norm < 1e-5
    assert corrected.clamped == 0


@pytest.mark.parametrize(("clamp", "bound"), [(0.25, R), (0.5, R - 1), (CLAMP, 0)])
def test_the_clamp_bounds_every_column_as_the_paper_says(clamp: float, bound: int, device: str) -> None:
    layer, s = trained(lora=0.5), 0.75
    corrected = layer.correct(s, clamp, device=device)
    A_rows = corrected.A.double().cpu()
    B_rows = layer.B @ layer.A @ A_rows.T  # since A' has orthonormal rows that span those of A
    D = (layer.W - layer.emulator) @ A_rows.T
    clamped = 0
    for j in range(R):
        ratio = float(D[:, j].abs().mean() / (s * B_rows[:, j]).abs().mean())
        if ratio > clamp:
            D[:, j] *= clamp / ratio
            clamped += 1
    torch.testing.assert_close(corrected.B.double().cpu(), B_rows - D / s, rtol=0, atol=1e-5)
    assert corrected.clamped == clamped == bound  # all, some and none of the columns
    assert corrected.delta_norm == pytest.approx(float(D.norm()), rel=1e-5)
    assert corrected.update_norm == pytest.approx(s * float((layer.B @ layer.A).norm()), rel=1e-5)


@pytest.mark.parametrize("clamp", [None, float("inf")])
def test_without_a_bound_an_untrained_lora_makes_the_base_imitate_the_emulator(clamp: float | None) -> None:
    layer = trained(lora=0.0)
    corrected = layer.W + 2 * update(layer.correct(2.0, clamp))
    torch.testing.assert_close(corrected @ layer.A.T, layer.emulator @ layer.A.T, rtol=0, atol=1e-5)


def test_with_a_clamp_an_untrained_lora_leaves_the_base_as_it_is() -> None:
    corrected = trained(lora=0.0).correct(2.0, CLAMP)
    assert torch.equal(corrected.B, torch.zeros(OUT, R))
    assert (corrected.clamped, corrected.delta_norm, corrected.update_norm) == (R, 0, 0)
    # The limit is continuous: a LoRA that was hardly trained hardly changes the base.
    small = trained(lora=1e-6).correct(2.0, CLAMP)
    assert float(update(small).abs().max()) < 1e-5


def test_a_rank_deficient_lora_is_corrected_on_the_directions_that_it_reads() -> None:
    layer = trained()
    A = torch.stack([layer.A[0], layer.A[1], 2 * layer.A[0], torch.zeros(IN, dtype=torch.float64)])
    deficient = Trained(A, layer.B, layer.W, layer.U, layer.S, layer.Vh)
    corrected = deficient.correct(2.0)
    assert corrected.directions == 2
    torch.testing.assert_close(corrected.A @ corrected.A.T, torch.diag(torch.tensor([1.0, 1, 0, 0])), rtol=0, atol=1e-6)
    assert torch.equal(corrected.B[:, 2:], torch.zeros(OUT, 2))
    merged, target = layer.W + 2 * update(corrected), layer.emulator + 2 * layer.B @ A
    torch.testing.assert_close(merged @ A.T, target @ A.T, rtol=0, atol=1e-5)


def test_a_lora_whose_a_is_zero_stays_without_effect() -> None:
    layer = trained()
    silent = Trained(torch.zeros_like(layer.A), layer.B, layer.W, layer.U, layer.S, layer.Vh)
    corrected = silent.correct(2.0)
    assert corrected.directions == 0
    assert torch.equal(update(corrected), torch.zeros(OUT, IN).double())


@property_test
@given(out=st.integers(1, 9), inn=st.integers(1, 9), r=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_shape_keeps_its_rank_and_matches_the_emulator(out: int, inn: int, r: int, seed: int) -> None:
    layer = trained(out, inn, r, seed=seed)
    corrected = layer.correct(1.5)
    assert (corrected.A.shape, corrected.B.shape) == ((r, inn), (out, r))  # also where r exceeds in
    assert corrected.directions == torch.linalg.matrix_rank(layer.A, rtol=1e-4)
    merged, target = layer.W + 1.5 * update(corrected), layer.emulator + 1.5 * layer.B @ layer.A
    torch.testing.assert_close(merged @ layer.A.T, target @ layer.A.T, rtol=0, atol=1e-5)


def test_bfloat16_tensors_are_corrected_in_float32(device: str) -> None:
    layer, s = trained(), 2.0
    coarse = [tensor.bfloat16().to(device) for tensor in vars(layer).values()]
    A, B, W, U, S, Vh = coarse
    exact = Trained(*(tensor.double().cpu() for tensor in coarse))
    corrected = correct_lora(A, B, s, W, U, S, Vh, clamp=None)
    assert corrected.A.dtype == corrected.B.dtype == torch.float32
    x = exact.A.T
    target = (exact.emulator + s * exact.B @ exact.A) @ x

    def error(update: torch.Tensor) -> float:
        return float(((exact.W + s * update) @ x - target).abs().max())

    # Control: the same steps in bfloat16, as the released code takes them.
    A_rows = torch.linalg.svd(A.float(), full_matrices=False)[2].bfloat16()
    D = (W - U @ (S[:, None] * Vh)) @ A_rows.T
    in_bfloat16 = (B @ (A @ A_rows.T) - D / s).double().cpu() @ A_rows.double().cpu()
    assert error(update(corrected)) < 1e-5
    assert error(in_bfloat16) > 1e-3


def test_the_arguments_are_not_modified() -> None:
    tensors = [tensor.float() for tensor in vars(trained()).values()]
    A, B, W, U, S, Vh = tensors
    before = [tensor.clone() for tensor in tensors]
    correct_lora(A, B, 2.0, W, U, S, Vh, clamp=0.1)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize("scaling", [0.0, float("nan"), float("inf")])
def test_a_scaling_that_cannot_carry_a_correction_is_refused(scaling: float) -> None:
    with pytest.raises(NumericalError, match=f"the LoRA scaling is {scaling:g}"):
        trained().correct(scaling)


@pytest.mark.parametrize("name", ["A", "B", "W", "U", "S", "Vh"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(name: str, value: float) -> None:
    layer = trained()
    tensor = getattr(layer, name)
    tensor[(0,) * tensor.dim()] = value
    where = "the LoRA pair holds" if name in "AB" else "the weight or the emulator holds"
    with pytest.raises(NumericalError, match=f"{where} NaN or infinity"):
        layer.correct(2.0, CLAMP)
