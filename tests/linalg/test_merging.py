"""merge_weight: W - T (W - W_E) + s B A as in float64, in blocks, in place, and refused where it overflows."""

from __future__ import annotations

import pytest
import torch

from emloc_tools.errors import NumericalError
from emloc_tools.linalg import merging
from emloc_tools.linalg.merging import merge_weight

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]


@pytest.fixture
def problem() -> Problem:
    """W (7, 5), A (2, 5), B (7, 2) and factors of rank 3."""
    W, A, B = torch.randn(7, 5), torch.randn(2, 5), torch.randn(7, 2)
    return W, A, B, [torch.randn(7, 3), torch.rand(3) + 1, torch.randn(3, 5)]


def exact(problem: Problem, scaling: float, share: float) -> torch.Tensor:
    """The formula in float64."""
    W, A, B, (U, S, Vh) = (
        problem[0].double(),
        problem[1].double(),
        problem[2].double(),
        map(torch.Tensor.double, problem[3]),
    )
    return W - share * (W - U @ S.diag() @ Vh) + scaling * B @ A


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("values", [1, 11, 10**6], ids=["a row at a time", "two rows", "at once"])
def test_it_is_the_formula_whatever_the_blocks(
    problem: Problem, share: float, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "BLOCK", values)
    W, A, B, factors = problem
    found = merge_weight(W.clone(), lora=(A, B, 1.7), factors=factors, share=share)
    torch.testing.assert_close(found.double(), exact(problem, 1.7, share), rtol=1e-5, atol=1e-5)


def test_a_transposed_weight_stays_so_and_is_overwritten(problem: Problem) -> None:
    W, A, B, _ = problem
    stored = W.T.contiguous()
    found = merge_weight(stored.T, lora=(A, B, 0.5))
    assert found.data_ptr() == stored.data_ptr()
    torch.testing.assert_close(stored.T.double(), exact(problem, 0.5, 0.0), rtol=1e-5, atol=1e-5)


def test_another_dtype_leaves_the_weight_as_it_was_and_keeps_strides(problem: Problem) -> None:
    W, A, B, _ = problem
    stored = W.T.contiguous()
    found = merge_weight(stored.T, lora=(A, B, 0.5), dtype=torch.bfloat16)
    assert torch.equal(stored.T, W)
    assert found.T.is_contiguous()
    assert torch.equal(found, merge_weight(W.clone(), lora=(A, B, 0.5)).bfloat16())


def test_at_1_the_emulator_is_exact_beside_a_huge_weight(problem: Problem) -> None:
    W, _, _, (U, S, Vh) = problem
    found = merge_weight(1e9 * W, factors=(U, S, Vh), share=1.0)
    assert torch.equal(found, (U * S) @ Vh)
    by_difference = 1e9 * W + ((U * S) @ Vh - 1e9 * W)
    assert not torch.allclose(by_difference, (U * S) @ Vh, rtol=0.1)  # the control


def test_a_float64_weight_is_merged_in_float64(problem: Problem) -> None:
    W, A, B, _ = problem
    found = merge_weight(W.double(), lora=(A, B, 1.7))
    assert (found - exact(problem, 1.7, 0.0)).abs().max() < 1e-14


def test_overflow_of_the_stored_dtype_is_an_error(problem: Problem) -> None:
    W, A, B, _ = problem
    merge_weight(W.half(), lora=(A, B, 1e3))
    with pytest.raises(NumericalError, match=r"beyond what torch\.float16 holds; choose a wider --dtype"):
        merge_weight(W.half(), lora=(A, B, 1e6))
