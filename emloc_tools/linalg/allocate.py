"""How many directions each layer of an emulator gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from emloc_tools.records import Layer

FLOOR = 0.35  # of the uniform rank; the adaptive allocation never goes below it


def uniform_rank(layer: Layer, ratio: float) -> int:
    """The rank at which the factors hold `ratio` (a fraction > 0) of W's values, at least 1, at most min(out, in)."""
    rank = int(ratio * layer.parameters / (layer.out_features + layer.in_features))
    return max(1, min(rank, layer.out_features, layer.in_features))


def largest_useful_rank(layer: Layer) -> int:
    """The largest rank whose factors are smaller than W itself; 0 where even rank 1 is not smaller."""
    return (layer.parameters - 1) // layer.rank_cost


def uniform_ranks(layers: Sequence[Layer], ratio: float) -> dict[str, int]:
    """The same `ratio` for every layer. A layer whose factors would not be smaller is left out (stays dense)."""
    ranks = {layer.name: uniform_rank(layer, ratio) for layer in layers}
    return {layer.name: ranks[layer.name] for layer in layers if ranks[layer.name] <= largest_useful_rank(layer)}


def stored_values(layers: Sequence[Layer], ranks: Mapping[str, int]) -> int:
    """Values that the layers need: U, S and Vh where a rank is given, W elsewhere (biases not counted)."""
    return sum(ranks[layer.name] * layer.rank_cost if layer.name in ranks else layer.parameters for layer in layers)


def ratio_for_budget(layers: Sequence[Layer], budget: int) -> float | None:
    """The largest uniform ratio (to 1e-6) whose layers need at most `budget` values; None if none fits."""
    if stored_values(layers, {}) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        fits = stored_values(layers, uniform_ranks(layers, middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low if low > 0 else None


def adaptive_ranks(
    layers: Sequence[Layer], shares: Mapping[str, torch.Tensor], ratio: float, floor: float = FLOOR
) -> dict[str, int]:
    """Spend the values of the uniform allocation where they remove the most relative output error per value.

    `shares[name] (m,)` are the parts of a layer's output energy that its directions carry, fractions 0–1,
    descending. Every layer starts at `floor` of its uniform rank; then single directions are taken greedily, by
    share per stored value, while the budget lasts. Greedy is optimal up to one direction, for the shares only fall
    within a layer.
    """
    uniform = uniform_ranks(layers, ratio)
    chosen = [layer for layer in layers if layer.name in uniform]
    ranks = {layer.name: max(1, int(floor * uniform[layer.name])) for layer in chosen}
    budget = sum((uniform[layer.name] - ranks[layer.name]) * layer.rank_cost for layer in chosen)
    gains, owners = [], []
    for index, layer in enumerate(chosen):
        candidates = shares[layer.name][ranks[layer.name] : largest_useful_rank(layer)] / layer.rank_cost
        gains.append(candidates)
        owners.append(torch.full((len(candidates),), index))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    cheapest = min((layer.rank_cost for layer in chosen), default=0)
    for index in torch.cat(owners)[order].tolist():
        layer = chosen[index]
        if layer.rank_cost <= budget:
            ranks[layer.name] += 1
            budget -= layer.rank_cost
        if budget < cheapest:
            break
    return ranks
