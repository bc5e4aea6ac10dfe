"""Ranks against exact fractions, exhaustive search and measured errors."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc_tools.linalg.allocate import (
    FLOOR,
    adaptive_ranks,
    largest_useful_rank,
    ratio_for_budget,
    stored_values,
    uniform_rank,
    uniform_ranks,
)
from emloc_tools.linalg.lowrank import decompose, output_energies
from emloc_tools.records import Layer
from tests.linalg.problems import gram, inputs, layer, property_test, weight

sizes = st.integers(1, 40)
shapes = st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5)


def named(shapes: list[tuple[int, int]]) -> list[Layer]:
    return [layer(f"layer{index}", *shape) for index, shape in enumerate(shapes)]


def values(layer: Layer, rank: int) -> int:
    """Entries of U, S and Vh, counted on the tensors themselves."""
    U, S, Vh = torch.empty(layer.out_features, rank), torch.empty(rank), torch.empty(rank, layer.in_features)
    return U.numel() + S.numel() + Vh.numel()


def falling_shares(count: int, *, decay: float) -> torch.Tensor:
    energies = torch.arange(1, count + 1, dtype=torch.float64) ** -decay
    return energies / energies.sum()


@property_test
@given(shape=st.tuples(st.integers(1, 9000), st.integers(1, 9000)), percent=st.integers(1, 100))
def test_the_uniform_rank_is_the_floor_of_the_exact_fraction(shape: tuple[int, int], percent: int) -> None:
    exact = Fraction(percent, 100) * shape[0] * shape[1] / (shape[0] + shape[1])
    assert uniform_rank(layer("layer", *shape), percent / 100) == min(max(1, int(exact)), *shape)


def test_a_ratio_that_is_not_exact_in_binary_does_not_cost_a_rank() -> None:
    assert int(0.57 * (200 * 200) / (200 + 200)) == 56  # what plain arithmetic makes of 57% of 100
    assert uniform_rank(layer("layer", 200, 200), 0.57) == 57


@property_test
@given(shape=st.tuples(sizes, sizes))
def test_the_largest_useful_rank_is_the_last_one_whose_factors_are_smaller(shape: tuple[int, int]) -> None:
    one = layer("layer", *shape)
    smaller = [rank for rank in range(1, max(shape) + 1) if values(one, rank) < shape[0] * shape[1]]
    assert largest_useful_rank(one) == max(smaller, default=0)


@property_test
@given(shapes=shapes, percent=st.integers(1, 100))
def test_uniform_ranks_leave_out_the_layers_that_would_not_shrink(shapes: list[tuple[int, int]], percent: int) -> None:
    layers = named(shapes)
    ranks = uniform_ranks(layers, percent / 100)
    for one in layers:
        rank = uniform_rank(one, percent / 100)
        assert ranks.get(one.name) == (rank if values(one, rank) < one.parameters else None)
    total = sum(values(one, ranks[one.name]) if one.name in ranks else one.parameters for one in layers)
    assert stored_values(layers, ranks) == total


def ratio_steps(layers: list[Layer]) -> list[float]:
    """Every ratio below 1 at which some layer's rank changes, and one between each of them and the next."""
    steps = {Fraction(0), Fraction(1)}
    for one in layers:
        unit = Fraction(one.out_features + one.in_features, one.parameters)
        steps |= {step for rank in range(1, min(one.out_features, one.in_features) + 1) if (step := rank * unit) < 1}
    ordered = sorted(steps)
    return [float((low + high) / 2) for low, high in itertools.pairwise(ordered)]


@property_test
@given(shapes=shapes, part=st.integers(0, 110))
def test_the_ratio_of_a_budget_uses_the_most_values_that_fit(shapes: list[tuple[int, int]], part: int) -> None:
    layers = named(shapes)
    whole = sum(one.parameters for one in layers)
    budget = whole * part // 100
    found = ratio_for_budget(layers, budget)
    needs = [stored_values(layers, uniform_ranks(layers, ratio)) for ratio in ratio_steps(layers)]
    assert needs == sorted(needs)  # also where a layer turns dense
    fitting = [need for need in needs if need <= budget]
    if budget >= whole:
        assert found == 1
    elif not fitting:
        assert found is None
    else:
        assert found is not None
        assert stored_values(layers, uniform_ranks(layers, found)) == max(fitting)


def test_the_ratio_of_a_budget_is_as_tight_as_one_rank_of_a_large_layer() -> None:
    layers = [layer("narrow", 1024, 4096), layer("wide", 128256, 4096)]
    for ratio in (0.05, 0.3, 0.9):
        budget = stored_values(layers, uniform_ranks(layers, ratio))
        found = ratio_for_budget(layers, budget)
        assert found is not None
        assert uniform_ranks(layers, found) == uniform_ranks(layers, ratio)
        less = ratio_for_budget(layers, budget - 1)
        assert less is not None
        assert budget - stored_values(layers, uniform_ranks(layers, less)) <= 128256 + 4096 + 1


@property_test
@given(
    shapes=shapes,
    percent=st.integers(5, 95),
    floor=st.sampled_from([0.0, FLOOR, 1.0]),
    decays=st.lists(st.floats(0, 4), min_size=5, max_size=5),
    available=st.lists(st.floats(0.2, 1), min_size=5, max_size=5),
)
def test_adaptive_ranks_spend_the_uniform_budget_within_their_bounds(
    shapes: list[tuple[int, int]], percent: int, floor: float, decays: list[float], available: list[float]
) -> None:
    layers, ratio = named(shapes), percent / 100
    counts = [max(1, int(part * min(shape))) for part, shape in zip(available, shapes, strict=False)]
    shares = {
        one.name: falling_shares(count, decay=decay) for one, count, decay in zip(layers, counts, decays, strict=False)
    }
    uniform, adaptive = uniform_ranks(layers, ratio), adaptive_ranks(layers, shares, ratio, floor)
    assert adaptive.keys() == uniform.keys()
    chosen = [one for one in layers if one.name in uniform]
    left = stored_values(chosen, uniform) - stored_values(chosen, adaptive)
    assert left >= 0
    for one in chosen:
        rank, most = adaptive[one.name], min(len(shares[one.name]), largest_useful_rank(one))
        assert min(max(1, int(floor * uniform[one.name])), most) <= rank <= most
        assert rank == most or values(one, 1) > left  # nothing that still fits was left unspent


def best_removed(layers: list[Layer], shares: dict[str, torch.Tensor], floors: list[int], budget: int) -> float:
    """The largest sum of kept shares over every allocation that keeps to floors and budget."""
    best = 0.0
    options = [
        range(least, min(len(shares[one.name]), largest_useful_rank(one)) + 1)
        for one, least in zip(layers, floors, strict=True)
    ]
    for ranks in itertools.product(*options):
        if sum(values(one, rank) for one, rank in zip(layers, ranks, strict=True)) <= budget:
            best = max(best, sum(float(shares[one.name][:rank].sum()) for one, rank in zip(layers, ranks, strict=True)))
    return best


@property_test
@given(decays=st.tuples(st.floats(0, 3), st.floats(0, 3), st.floats(0, 3)), percent=st.integers(20, 80))
def test_adaptive_ranks_are_within_one_direction_of_the_best_allocation(
    decays: tuple[float, float, float], percent: int
) -> None:
    layers = named([(8, 12), (12, 12), (10, 6)])
    shares = {
        one.name: falling_shares(min(one.out_features, one.in_features), decay=decay)
        for one, decay in zip(layers, decays, strict=True)
    }
    uniform, ranks = uniform_ranks(layers, percent / 100), adaptive_ranks(layers, shares, percent / 100)
    chosen = [one for one in layers if one.name in uniform]
    floors = [max(1, int(FLOOR * uniform[one.name])) for one in chosen]
    best = best_removed(chosen, shares, floors, stored_values(chosen, uniform))
    kept = sum(float(shares[one.name][: ranks[one.name]].sum()) for one in chosen)
    next_gains = [float(shares[one.name][ranks[one.name]]) for one in chosen if ranks[one.name] < len(shares[one.name])]
    assert best - max(next_gains, default=0.0) - 1e-12 <= kept <= best + 1e-12


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_adaptive_ranks_lower_the_summed_squared_error_of_layers_that_differ(ratio: float) -> None:
    layers = named([(32, 48), (48, 32), (40, 40)])
    weights = {one.name: weight(one.out_features, one.in_features, seed=i) for i, one in enumerate(layers)}
    data = {
        one.name: inputs(200, one.in_features, decay=decay) for one, decay in zip(layers, (0.1, 1.0, 2.5), strict=True)
    }
    grams = {one.name: gram(data[one.name], weights[one.name], "input") for one in layers}
    energies = {one.name: output_energies(weights[one.name], grams[one.name]) for one in layers}
    shares = {name: values / values.sum() for name, values in energies.items()}
    uniform, adaptive = uniform_ranks(layers, ratio), adaptive_ranks(layers, shares, ratio)
    assert stored_values(layers, adaptive) <= stored_values(layers, uniform)

    def summed_error(ranks: dict[str, int]) -> float:
        return sum(decompose(weights[name], rank, grams[name]).relative_error ** 2 for name, rank in ranks.items())

    assert summed_error(adaptive) < 0.95 * summed_error(uniform)
    assert adaptive["layer0"] > uniform["layer0"]  # the layer whose energy is spread gains,
    assert adaptive["layer2"] < uniform["layer2"]  # the one whose energy is in few directions gives


def test_layers_that_are_alike_get_the_uniform_ranks(device: str) -> None:
    layers = named([(32, 48)] * 4)
    shares = {one.name: falling_shares(32, decay=1.0).to(device) for one in layers}
    assert adaptive_ranks(layers, shares, 0.5) == uniform_ranks(layers, 0.5)


def test_of_two_layers_with_equal_shares_the_cheaper_one_gets_more_directions() -> None:
    layers = named([(32, 48), (64, 96)])
    shares = {one.name: falling_shares(32, decay=1.0) for one in layers}
    uniform, ranks = uniform_ranks(layers, 0.5), adaptive_ranks(layers, shares, 0.5, floor=0.0)
    assert ranks["layer0"] > uniform["layer0"]
    # Shares fall as 1/i, so share per value is even where ranks are in inverse proportion to the costs, 81 and 161.
    at_bound = ranks["layer0"] == largest_useful_rank(layers[0])
    assert at_bound or ranks["layer0"] / ranks["layer1"] == pytest.approx(161 / 81, rel=0.2)


def test_a_layer_without_energy_keeps_its_floor_and_leaves_the_rest_to_others() -> None:
    layers = named([(32, 48), (32, 48)])
    shares = {"layer0": torch.zeros(32, dtype=torch.float64), "layer1": falling_shares(32, decay=0.5)}
    uniform, ranks = uniform_ranks(layers, 0.4), adaptive_ranks(layers, shares, 0.4)
    assert ranks["layer0"] == int(FLOOR * uniform["layer0"])
    assert ranks["layer1"] == min(2 * uniform["layer1"] - ranks["layer0"], largest_useful_rank(layers[1]))


def test_a_direction_that_no_longer_fits_is_passed_over_for_a_smaller_one() -> None:
    layers = named([(20, 20), (6, 6), (5, 5), (5, 5)])
    uniform = uniform_ranks(layers, 0.7)
    assert uniform == {"layer0": 7, "layer1": 2, "layer2": 1, "layer3": 1}
    shares = {
        "layer0": torch.full((20,), 1 / 20, dtype=torch.float64),
        "layer1": torch.tensor([0.5, 0.5], dtype=torch.float64),
        "layer2": torch.tensor([0.6, 0.4], dtype=torch.float64),
        "layer3": torch.tensor([0.999, 0.001], dtype=torch.float64),
    }
    # All start at 1, and 6 · 41 + 13 = 259 values are left. The second directions of layers 1 and 2 are worth most:
    # 259 − 13 − 11 = 235. Five more of layer 0 leave 235 − 5 · 41 = 30; its next one does not fit, layer 3's does.
    assert adaptive_ranks(layers, shares, 0.7, floor=0.0) == {"layer0": 6, "layer1": 2, "layer2": 2, "layer3": 2}


def test_no_layers_need_no_ranks() -> None:
    assert uniform_ranks([], 0.5) == adaptive_ranks([], {}, 0.5) == {}
    dense_only = [layer("column", 1, 40)]
    assert adaptive_ranks(dense_only, {"column": torch.ones(1)}, 0.5) == {}
    assert ratio_for_budget(dense_only, 39) is None
