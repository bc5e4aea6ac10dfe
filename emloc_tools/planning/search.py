"""The largest ratio at which the emulator's training step fits, by few evaluations."""

from __future__ import annotations

from collections.abc import Callable

GRID = 1000  # ratios are multiples of 1/1000, as people write them


def largest_fitting(
    measure: Callable[[float], int], weigh: Callable[[float], int], budget: int, whole: int
) -> float | None:
    """The largest multiple of 1/1000 below 1 with `measure(ratio) <= budget`; None if not even 1/1000 fits.

    `measure` costs a simulated step; `whole` is its value for the model itself, which does not fit. `weigh` is the part
    that the weights take, cheap to know exactly. The rest hardly changes with the ratio and never falls: so where it
    is not known it is interpolated, and what a measured rest plus the weights exceed needs no evaluation. The ratio
    that is returned has been measured.
    """
    low, high = 0, GRID  # the largest step that fits, if it is not 0, and the smallest that is known not to
    rest = {GRID: whole - weigh(1.0)}
    while high - low > 1:
        step = _last(low + 1, high - 1, lambda step: weigh(step / GRID) + _interpolated(rest, step), budget)
        total = measure(step / GRID)
        rest[step] = total - weigh(step / GRID)
        if total > budget:
            high = step
            continue
        low = step
        high = _last(low, high - 1, lambda step: weigh(step / GRID), budget - rest[low]) + 1
    return low / GRID if low else None


def _last(first: int, last: int, amount: Callable[[int], float], budget: int) -> int:
    """The last step from `first` to `last` of which the growing `amount` is within the budget, at least `first`."""
    excessive = last + 1
    while excessive - first > 1:
        middle = (first + excessive) // 2
        first, excessive = (middle, excessive) if amount(middle) <= budget else (first, middle)
    return first


def _interpolated(rest: dict[int, int], step: int) -> float:
    """The rest at a step, between the measured ones beside it; that of the nearest one where there is one side only."""
    below = max((at for at in rest if at <= step), default=None)
    above = min((at for at in rest if at >= step), default=None)
    if below is None or above is None or below == above:
        only = above if below is None else below
        assert only is not None  # the model itself is among them
        return rest[only]
    return rest[below] + (rest[above] - rest[below]) * (step - below) / (above - below)
