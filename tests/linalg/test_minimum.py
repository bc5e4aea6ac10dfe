"""The minimiser finds minima that are known in closed form, and says when it has not."""

from __future__ import annotations

import pytest
import torch

from emloc_tools.errors import NumericalError
from emloc_tools.linalg import minimum
from emloc_tools.linalg.minimum import minimise


def quadratic(size: int, condition: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A positive definite matrix of a given condition number, a target b, and the solution of A x = b."""
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    A = Q @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size).double()) @ Q.T
    b = torch.randn(size, dtype=torch.float64)
    return A.to(dtype), b.to(dtype), torch.linalg.solve(A, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-3), (torch.float32, 0.1)])
def test_a_badly_scaled_quadratic_ends_in_its_solution(dtype: torch.dtype, tolerance: float) -> None:
    """The distance to the solution is at most the condition number times the gradient that is left."""
    A, b, solution = quadratic(40, 100, dtype)
    x = torch.zeros(40, dtype=dtype, requires_grad=True)
    found = minimise(lambda: x @ A @ x / 2 - b @ x, [x])
    assert found.converged
    assert found.gradient == pytest.approx(
        float((A @ x - b).detach().abs().max()), abs=1e-12 if dtype == torch.float64 else 1e-5
    )
    assert float((x.detach().double() - solution).norm() / solution.norm()) < tolerance


def test_several_parameters_and_a_function_that_is_not_convex_end_at_rest() -> None:
    """Rosenbrock's valley, whose only resting point is (1, 1)."""
    x, y = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-1.2, 1.0))
    found = minimise(lambda: (1 - x) ** 2 + 100 * (y - x**2) ** 2, [x, y], tolerance=1e-10)
    assert (x.item(), y.item()) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert found.value == pytest.approx(0, abs=1e-12)


def test_what_has_no_minimum_is_said_not_to_have_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that a plane tells apart, without decay: the loss falls for ever as the plane gets steeper."""
    monkeypatch.setattr(minimum, "ROUNDS", 1)
    monkeypatch.setattr(minimum, "STEPS", 3)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    X, y = torch.eye(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = minimise(lambda: torch.nn.functional.softplus(-y * (X @ w)).mean(), [w])
    assert not found.converged
    assert found.gradient > 0


def test_a_value_that_is_not_finite_is_an_error() -> None:
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NumericalError, match="not finite while the head is fitted"):
        minimise(lambda: (x / 0).sum(), [x])


def test_it_takes_the_same_way_every_time() -> None:
    A, b, _ = quadratic(10, 10, torch.float64)
    ends = []
    for _ in range(2):
        x = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        ends.append((minimise(lambda x=x: x @ A @ x / 2 - b @ x, [x]), x.detach().clone()))  # type: ignore[misc]
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])
