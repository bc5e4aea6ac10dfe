"""The size of an emulator as users give it (--ratio, --params or --size), turned into a uniform ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from emloc_tools.errors import InputError
from emloc_tools.files.tensors import TensorSpec
from emloc_tools.linalg.allocate import ratio_for_budget, uniform_ranks
from emloc_tools.records import Layer

GUARD_VALUES = 1  # every emulator stores one more value; see files.emulator_writer


def budget_ratio(
    dense: Sequence[TensorSpec],
    layers: Mapping[str, tuple[Layer, TensorSpec]],
    dtype: torch.dtype,
    *,
    ratio: float | None,
    params: int | None,
    size: int | None,
) -> float:
    """The uniform ratio at which an emulator keeps to exactly one of the three budgets.

    `dense` are the tensors that are kept as they are. `layers` are those to be factored in `dtype`, each with its
    weight, which is kept where factors would not be smaller. `ratio` is a fraction 0–1 of the layers' values; `params`
    counts the values and `size` the bytes of all stored tensors. Raises `InputError` where none or several are given,
    or the budget cannot be kept.
    """
    if sum(value is not None for value in (ratio, params, size)) != 1:
        raise InputError("give exactly one of --ratio, --params and --size, such as --ratio 0.25")
    if ratio is not None:
        if not 0 < ratio < 1:
            raise InputError(
                f"--ratio {ratio:g} is outside 0 to 1: it is the part of a layer's values to keep, such as 0.25"
            )
        return ratio
    if params is not None:
        return _ratio_within(params, "--params", dense, layers, count=_values, unit=1)
    assert size is not None  # exactly one was given
    return _ratio_within(size, "--size", dense, layers, count=_bytes, unit=dtype.itemsize)


def _ratio_within(
    wanted: int,
    option: str,
    dense: Sequence[TensorSpec],
    layers: Mapping[str, tuple[Layer, TensorSpec]],
    *,
    count: Callable[[TensorSpec], int],
    unit: int,
) -> float:
    """The largest ratio at which everything stored is at most `wanted`; `unit` is what one value of a factor costs."""
    rest = sum(map(count, dense)) + GUARD_VALUES * unit
    whole = rest + sum(count(weight) for _, weight in layers.values())
    if wanted >= whole:
        raise InputError(
            f"{option} {wanted:,} is not below the base itself ({whole:,}); an emulator would gain nothing"
        )
    chosen = [layer for layer, _ in layers.values()]

    def stored(ratio: float) -> int:
        ranks = uniform_ranks(chosen, ratio)
        return rest + sum(
            ranks[name] * layer.rank_cost * unit if name in ranks else count(weight)
            for name, (layer, weight) in layers.items()
        )

    budget = (wanted - rest) // unit
    while (found := ratio_for_budget(chosen, budget)) is not None:
        excess = stored(found) - wanted
        if excess <= 0:
            return found
        # Weights that stay dense may have a wider dtype than the factors, by which `ratio_for_budget` counts them.
        budget -= -(-excess // unit)
    least = stored(torch.finfo(torch.float64).tiny)
    raise InputError(
        f"{option} {wanted:,} is too small: rank 1 everywhere and what stays dense need {least:,}; choose more, or "
        "factor more layers with --targets"
    )


def _values(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel()


def _bytes(spec: TensorSpec) -> int:
    return spec.nbytes
