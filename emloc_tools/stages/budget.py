"""The size of an emulator as users give it (--ratio, --params or --size), turned into a uniform ratio."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emloc_tools.errors import InputError
from emloc_tools.files.tensors import TensorSpec
from emloc_tools.linalg.allocate import ratio_for_budget
from emloc_tools.records import Layer


def budget_ratio(
    dense: Sequence[TensorSpec],
    layers: Sequence[Layer],
    dtype: torch.dtype,
    *,
    ratio: float | None,
    params: int | None,
    size: int | None,
) -> float:
    """The uniform ratio at which an emulator keeps to exactly one of the three budgets.

    `dense` are the tensors that are kept as they are, `layers` those to be factored in `dtype`. `ratio` is a fraction
    0–1 of the layers' values, `params` a number of parameters and `size` of bytes of everything stored. Raises
    `InputError` where none or several are given, or the budget cannot be kept.
    """
    if sum(value is not None for value in (ratio, params, size)) != 1:
        raise InputError("give exactly one of --ratio, --params and --size")
    if ratio is not None:
        if not 0 < ratio < 1:
            raise InputError(
                f"--ratio {ratio:g} is outside 0 to 1: it is the part of a layer's values to keep, such as 0.25"
            )
        return ratio
    if params is not None:
        rest, wanted, unit, option = (
            sum(torch.Size(spec.shape).numel() for spec in dense),
            params,
            1,
            "--params",
        )
    else:
        assert size is not None  # exactly one was given
        rest, wanted, unit, option = sum(spec.nbytes for spec in dense), size, dtype.itemsize, "--size"
    found = ratio_for_budget(layers, (wanted - rest) // unit)
    if found is None:
        least = rest + sum(layer.rank_cost for layer in layers) * unit
        raise InputError(f"{option} {wanted:,} is too small: what stays dense and rank 1 everywhere need {least:,}")
    if found >= 1:
        whole = rest + sum(layer.parameters for layer in layers) * unit
        raise InputError(
            f"{option} {wanted:,} is not below the base itself ({whole:,}); an emulator would gain nothing"
        )
    return found
