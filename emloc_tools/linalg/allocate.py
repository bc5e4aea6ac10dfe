"""How many directions each layer of an emulator gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from emloc_tools.records import Layer

FLOOR = 0.35  # of the uniform rank; the adaptive allocation never goes below it


def uniform_rank(layer: Layer, ratio: float) -> int:
    """floor(`ratio` · out · in / (out + in)) for a fraction `ratio`, at least 1 and at most min(out, in).

    That is the paper's rule: U and Vh together hold `ratio` of W's values (S, of one value per direction, aside).
    """
    exact = ratio * layer.out_features * layer.in_features / (layer.out_features + layer.in_features)
    rank = math.floor(exact * (1 + 1e-12))  # 0.57 · 100 is 56.99999999999999 in binary
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
    """The largest uniform ratio whose layers need at most `budget` values; 1 if W itself fits, None if nothing does.

    The need only grows with the ratio (a layer becomes dense where its factors stop being smaller), so bisection
    finds the ratio to within float precision of the step that no longer fits.
    """
    if stored_values(layers, {}) <= budget:
        return 1.0
    fitting, excessive = 0.0, 1.0
    while (middle := (fitting + excessive) / 2) - fitting > 1e-12:
        if stored_values(layers, uniform_ranks(layers, middle)) <= budget:
            fitting = middle
        else:
            excessive = middle
    return fitting or None


def adaptive_ranks(
    layers: Sequence[Layer], gains: Mapping[str, torch.Tensor], ratio: float, floor: float = FLOOR
) -> dict[str, int]:
    """Spend the values of the uniform allocation where they gain the most per value.

    `gains[name] (m,)` say what each direction of a layer is worth, descending and in one unit for all layers: the part
    of the layer's output energy that it carries, or, with gradients, its energy in terms of the loss. No layer gets
    more directions than its m. Every layer starts at `floor` of its uniform rank, at least one direction; then single
    directions are taken by gain per stored value while the budget lasts, passing over those that no longer fit. Gains
    only fall within a layer, so what is missing to the best allocation above the floors is at most the gain of one
    direction. Layers that `uniform_ranks` leaves dense stay dense.
    """
    uniform = uniform_ranks(layers, ratio)
    chosen = [layer for layer in layers if layer.name in uniform]
    most = {layer.name: min(len(gains[layer.name]), largest_useful_rank(layer)) for layer in chosen}
    ranks = {layer.name: min(max(1, int(floor * uniform[layer.name])), most[layer.name]) for layer in chosen}
    budget = stored_values(chosen, uniform) - stored_values(chosen, ranks)
    for layer in _by_gain(chosen, gains, ranks, most):
        if layer.rank_cost <= budget:
            ranks[layer.name] += 1
            budget -= layer.rank_cost
    return ranks


def _by_gain(
    layers: Sequence[Layer], gains: Mapping[str, torch.Tensor], ranks: Mapping[str, int], most: Mapping[str, int]
) -> list[Layer]:
    """For every direction from `ranks` up to `most` its layer, largest gain per stored value first."""
    if not layers:
        return []
    per_value = [gains[layer.name][ranks[layer.name] : most[layer.name]] / layer.rank_cost for layer in layers]
    owners = [torch.full_like(gain, index, dtype=torch.long) for index, gain in enumerate(per_value)]
    order = torch.cat(per_value).argsort(descending=True, stable=True)
    return [layers[index] for index in torch.cat(owners)[order].tolist()]
