"""The search for the largest ratio, against trying all of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from emloc_tools.planning.search import GRID, largest_fitting


def by_trying(memory: list[int], budget: int) -> float | None:
    fitting = [step for step in range(1, GRID) if memory[step] <= budget]
    return max(fitting) / GRID if fitting else None


@settings(max_examples=60, deadline=None)
@given(
    slope=st.integers(1, 10**6),
    constant=st.integers(0, 10**9),
    jumps=st.lists(st.tuples(st.integers(1, GRID), st.integers(0, 10**8)), max_size=8),
    share=st.floats(0, 1),
)
def test_it_is_the_largest_whatever_the_rest_does(
    slope: int, constant: int, jumps: list[tuple[int, int]], share: float
) -> None:
    """Memory that only grows: weights in proportion to the ratio, and a rest with jumps that nobody foresees."""
    weights = [slope * step for step in range(GRID + 1)]
    rest = [constant + sum(size for at, size in jumps if step >= at) for step in range(GRID + 1)]
    memory = [one + other for one, other in zip(weights, rest, strict=True)]
    budget = int(share * memory[GRID])
    found = largest_fitting(
        lambda ratio: memory[round(ratio * GRID)],
        lambda ratio: weights[round(ratio * GRID)],
        budget,
        memory[GRID],
    )
    if budget < memory[GRID]:
        assert found == by_trying(memory, budget)


def test_few_steps_are_simulated() -> None:
    """The rest of a real emulator is about linear in the ratio: then three evaluations find one in a thousand."""
    asked: list[float] = []

    def measure(ratio: float) -> int:
        asked.append(ratio)
        return int(5e9 + 1.6e10 * ratio + 3e8 * ratio**1.02)

    found = largest_fitting(measure, lambda ratio: int(1.6e10 * ratio), 12 * 10**9, int(2.13e10))
    assert found is not None
    assert measure(found) <= 12 * 10**9 < measure(found + 1 / GRID)
    assert len(asked[:-2]) <= 3


def test_nothing_fits() -> None:
    assert largest_fitting(lambda ratio: 100, lambda ratio: int(10 * ratio), 99, 200) is None
