"""The largest ratio at which the emulator's training step fits, by few evaluations."""

from __future__ import annotations

from collections.abc import Callable

GRID = 1000  # ratios are multiples of 1/1000, as people write them


def largest_fitting(
    measure: Callable[[float], int], weigh: Callable[[float], int], budget: int, whole: int
) -> float | None:
    """The largest multiple of 1/1000 below 1 with `measure(ratio) <= budget`; None if not even 1/1000 fits.

    `measure` costs a simulated step, and only grows with the ratio; `whole` is its value for the model itself, which
    does not fit. `weigh` is the part that the weights take, which is cheap to know exactly; the rest hardly changes, so
    it is interpolated between the ratios that were measured. In the end the ratio one step further is measured too,
    and does not fit, or is known not to.
    """
    low, high = 1, GRID
    rest = {low: measure(low / GRID) - weigh(low / GRID), high: whole - weigh(1.0)}
    if rest[low] + weigh(low / GRID) > budget:
        return None
    while high - low > 1:

        def expected(step: int, low: int = low, high: int = high) -> float:
            slope = (rest[high] - rest[low]) / (high - low)
            return weigh(step / GRID) + rest[low] + slope * (step - low)

        fitting, excessive = low, high
        while excessive - fitting > 1:
            middle = (fitting + excessive) // 2
            fitting, excessive = (middle, excessive) if expected(middle) <= budget else (fitting, middle)
        step = min(max(fitting, low + 1), high - 1)
        total = measure(step / GRID)
        rest[step] = total - weigh(step / GRID)
        if total <= budget:
            low = step
        else:
            high = step
    return low / GRID
