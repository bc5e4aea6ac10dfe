"""Gram accumulation against float64, and the choice of the side to keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc_tools.linalg import gram
from emloc_tools.linalg.gram import ROWS_PER_PRODUCT, accumulate, smaller_side
from tests.linalg.problems import inputs, layer, property_test


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gram_is_the_float64_gram_of_the_values_it_was_given(dtype: torch.dtype, device: str) -> None:
    X = inputs(2 * ROWS_PER_PRODUCT + 5, 24).to(dtype)
    G = torch.zeros(24, 24, device=device)
    accumulate(G, X.to(device))
    assert G.dtype == torch.float32
    assert relative(G, X.double().T @ X.double()) < 1e-6


def test_a_product_with_bfloat16_output_would_be_a_thousand_times_worse() -> None:
    X = inputs(512, 24, decay=1.5).bfloat16()
    expected = X.double().T @ X.double()
    G = torch.zeros(24, 24)
    accumulate(G, X)
    control = X.T @ X
    assert relative(G, expected) < 1e-6 < 1e-3 < relative(control, expected)
    smallest = torch.linalg.eigvalsh(expected)[0]
    assert torch.linalg.eigvalsh(G.double())[0] == pytest.approx(float(smallest), rel=1e-2)
    assert torch.linalg.eigvalsh(control.double())[0] < 0 < smallest


def test_float16_inputs_whose_squares_exceed_float16_are_summed() -> None:
    X = torch.full((3, 4), 300.0, dtype=torch.float16)
    G = torch.zeros(4, 4)
    accumulate(G, X)
    assert torch.equal(G, torch.full((4, 4), 3 * 300.0**2))
    assert torch.isinf(X.T @ X).all()


@property_test
@given(tokens=st.integers(0, 40), cut=st.integers(0, 40), rows=st.integers(1, 7))
def test_grams_of_parts_sum_to_the_gram_of_the_whole(tokens: int, cut: int, rows: int) -> None:
    X = inputs(tokens, 6, seed=tokens)
    whole, first, second, continued = (torch.zeros(6, 6, dtype=torch.float64) for _ in range(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "ROWS_PER_PRODUCT", rows)
        accumulate(whole, X)
        accumulate(first, X[:cut])
        accumulate(second, X[cut:])
        accumulate(continued, X[:cut])
        accumulate(continued, X[cut:])
    torch.testing.assert_close(whole, X.T @ X, rtol=0, atol=1e-13)
    torch.testing.assert_close(first + second, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(continued, whole, rtol=0, atol=1e-13)


def test_accumulating_leaves_the_inputs_as_they_are() -> None:
    X = inputs(10, 4).float()
    before = X.clone()
    accumulate(torch.zeros(4, 4), X)
    assert torch.equal(X, before)


@property_test
@given(features=st.integers(1, 64), outputs=st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_the_kept_side_is_the_one_with_fewer_values(features: int, outputs: list[int]) -> None:
    layers = [layer(str(index), size, features) for index, size in enumerate(outputs)]
    values = {
        "input": torch.zeros(features, features).numel(),
        "output": sum(torch.zeros(size, size).numel() for size in outputs),
    }
    assert values[smaller_side(layers)] == min(values.values())
