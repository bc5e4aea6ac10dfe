"""The minimum of a smooth function of a few parameters, by full-batch L-BFGS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from emloc_tools.errors import NumericalError

ROUNDS, STEPS = 20, 100  # L-BFGS starts anew with an empty memory after so many steps
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the gradient, relative to that at the start


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended: the value, the largest entry of the gradient, and how often both were computed.

    `converged` says whether the gradient became as small as was asked for.
    """

    value: float
    gradient: float
    evaluations: int
    converged: bool


def minimise(
    objective: Callable[[], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    *,
    tolerance: float | None = None,
    rounds: int | None = None,
) -> Minimum:
    """Change `parameters`, in place, to where the scalar `objective()` is least; a convex one has no better place.

    It ends where the largest entry of the gradient is below `tolerance` (that of `TOLERANCE`) times that at the start,
    or after `rounds` (`ROUNDS`) times `STEPS` steps. All have one dtype, float32 or float64, in which everything is
    computed. Deterministic. Raises `NumericalError` if the value is not finite.
    """
    evaluations = 0

    def evaluate() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            value = objective()
            value.backward()  # type: ignore[no-untyped-call]
        if not torch.isfinite(value):
            raise NumericalError("the loss is not finite while the head is fitted; try --fit-dtype float64")
        return value.detach()

    value = evaluate()
    wanted = (tolerance or TOLERANCE[parameters[0].dtype]) * _largest_gradient(parameters)
    for _ in range(ROUNDS if rounds is None else rounds):
        if _largest_gradient(parameters) <= wanted:
            break
        before = value
        # The optimiser's own tests would end it too early, and its line search can fail where a new memory helps.
        solver = torch.optim.LBFGS(
            list(parameters),
            max_iter=STEPS,
            history_size=20,
            tolerance_grad=wanted,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        solver.step(evaluate)  # type: ignore[no-untyped-call]
        value = evaluate()
        if value >= before:  # nothing is gained any more: rounding is all that is left
            break
    gradient = _largest_gradient(parameters)
    return Minimum(float(value), gradient, evaluations, gradient <= wanted)


def _largest_gradient(parameters: Sequence[torch.Tensor]) -> float:
    return max((float(p.grad.abs().max()) for p in parameters if p.grad is not None), default=0.0)
