"""What the options of build-emulator mean for a base and a calibration: layers, weighting and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from emloc_tools.errors import InputError, MismatchError
from emloc_tools.files.calibration import Calibration
from emloc_tools.files.manifest import CalibratedLayer, CalibratedStack
from emloc_tools.linalg.allocate import adaptive_ranks, uniform_ranks
from emloc_tools.models.base import BaseModel
from emloc_tools.models.layers import select_layers
from emloc_tools.records import Allocation, Layer, Weighting


def chosen_layers(
    opened: BaseModel, calibration: Calibration | None, targets: str | None, exclude: str | None
) -> list[Layer]:
    """The layers to factor; with a calibration those that it holds, which must have the base's shapes."""
    if calibration is None:
        return select_layers(opened.model, targets=targets, exclude=exclude)
    available = {layer.name: layer for layer in select_layers(opened.model, targets=targets or ".")}
    calibrated: dict[str, CalibratedLayer] = {**calibration.manifest.layers, **calibration.stacks}
    for name, record in calibrated.items():
        layer = available.get(name)
        if layer is None and targets is not None:
            continue
        if layer is None or (layer.out_features, layer.in_features, layer.experts) != (
            record.out_features,
            record.in_features,
            record.experts if isinstance(record, CalibratedStack) else None,
        ):
            raise MismatchError(
                f"the calibration in {calibration.folder} was made from {calibration.manifest.base.id}; its layer "
                f"{name} ({record.out_features} x {record.in_features}) is not in {opened.source.id}"
            )
    chosen = set(calibrated)
    if exclude is not None:
        chosen &= {layer.name for layer in select_layers(opened.model, targets=targets or ".", exclude=exclude)}
    layers = [layer for layer in available.values() if layer.name in chosen]
    if not layers:
        raise InputError(f"no layer chosen by --targets and --exclude is in the calibration in {calibration.folder}")
    return layers


def is_weighted(
    weighting: Weighting | None, damping: float | None, layers: Sequence[Layer], calibration: Calibration | None
) -> bool:
    """Whether errors are weighted by the loss gradient."""
    if damping is not None and not (damping > 0 and math.isfinite(damping)):
        raise InputError(
            f"--damping {damping:g} must be above 0: it is a share of the mean squared gradient, such as 0.05"
        )
    found = calibration is not None and any(calibration.has_gradients(layer) for layer in layers)
    if found and weighting != "none":
        return True
    where = "there is no calibration"
    if calibration is not None:
        where = f"the calibration in {calibration.folder} has none of the chosen layers"
    if weighting == "gradient":
        raise InputError(f"--weighting gradient needs gradients, and {where}; run calibrate with --gradients")
    if damping is not None:
        reason = (
            "--weighting none has no use for it" if weighting == "none" else f"{where}; run calibrate with --gradients"
        )
        raise InputError(f"--damping belongs to a weighting by gradients: {reason}")
    return False


def spend(
    layers: Sequence[Layer],
    ratio: float,
    allocation: Allocation,
    gains: Callable[[Layer, int], torch.Tensor],
    comparable: frozenset[str] | None,
) -> dict[str, int]:
    """The ranks that keep to the values of a uniform `ratio`.

    `gains(layer, total)` says what the directions of a layer, one of `total`, are worth; only `adaptive` asks for it.
    Only the layers in `comparable` share their budget, if it is given: those whose gains are in terms of the loss.
    """
    ranks = uniform_ranks(layers, ratio)
    if not ranks:
        raise InputError(
            f"no layer would become smaller at a ratio of {ratio:g}, for U, S and Vh hold more values than W there; "
            "choose a lower --ratio or other --targets"
        )
    if allocation == "adaptive":
        sharing = [
            layer for layer in layers if layer.name in ranks and (comparable is None or layer.name in comparable)
        ]
        worth = {layer.name: gains(layer, len(sharing)) for layer in sharing}
        ranks |= adaptive_ranks(sharing, worth, ratio)
    return ranks


def check_ranks(ranks: Mapping[str, int], layers: Sequence[Layer], has_budget: bool) -> None:
    if has_budget:
        raise InputError("ranks= already sets the size; give it without ratio=, params=, size= and allocation=")
    largest = {layer.name: min(layer.out_features, layer.in_features) for layer in layers}
    for name, rank in ranks.items():
        if name not in largest:
            raise InputError(f"ranks= names {name}, which is none of the {len(largest)} layers to factor")
        if not 1 <= rank <= largest[name]:
            raise InputError(f"ranks= gives {name} the rank {rank}, which is outside 1 to {largest[name]}")
    if not ranks:
        raise InputError("ranks= is empty; name at least one layer")
