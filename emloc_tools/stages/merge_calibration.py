"""merge-calibration: add up calibrations of the same base that were made from different data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from emloc_tools.errors import InputError, MismatchError, UnsupportedError
from emloc_tools.files.calibration import MANIFEST, Calibration, GramEntry, write_calibration
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import CalibratedLayer, CalibratedStack, GradientRecord, made_by
from emloc_tools.files.packing import pack_lower
from emloc_tools.files.tensors import MAX_SHARD_SIZE
from emloc_tools.records import Loss, Progress, Side, Step, silent
from emloc_tools.stages.refusals import require_apart, require_artifact

Record = TypeVar("Record", bound=CalibratedLayer)


@dataclass(frozen=True)
class MergedCalibration:
    """What `merge_calibration` wrote: `grams` are those of the data, `gradients` those of the loss gradient."""

    output: Path
    parts: int
    samples: int
    tokens: int
    layers: int
    grams: int
    gradients: int


def merge_calibration(
    *,
    parts: Sequence[Path],
    output: Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.merge_calibration",
    progress: Progress = silent,
) -> MergedCalibration:
    """Write the sum of two or more calibrations, one Gram in memory at a time.

    A layer that only some parts reached, or have gradients of, keeps what those have. Raises `MismatchError` if the
    parts come from different weights or two of them from the same samples, `UnsupportedError` if a layer has input-side
    statistics in one part and output-side in another, or gradients are of different losses.
    """
    check_output(output, overwrite=overwrite)
    if len(parts) < 2:
        raise InputError("give at least two calibrations to merge")
    for path in parts:
        require_artifact(path, MANIFEST, "a calibration")
    require_apart(output, parts)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(contextlib.closing(Calibration(path))) for path in parts]
        _refuse_same_samples(opened)
        layers, stacks = _common_layers(opened), _common_stacks(opened)
        grams, gradients = _entries(opened), _gradients(opened)
        reached = {name for entry in grams for name in entry.layers}
        entries = [*grams, *gradients]
        done = itertools.count(1)

        def add_up(entry: GramEntry) -> torch.Tensor:
            total = torch.zeros(entry.features, entry.features)
            for part in opened:
                total += _matrix(part, entry)
            progress(Step("merge-calibration", next(done), len(entries), entry.layers[0]))
            return pack_lower(total)

        folder = stack.enter_context(new_folder(output, overwrite=overwrite))
        manifest = write_calibration(
            folder,
            entries,
            add_up,
            max_shard_size=max_shard_size,
            fields={
                "made_by": made_by(command),
                "base": opened[0].manifest.base,
                "data": [record for part in opened for record in part.manifest.data],
                "layers": layers,
                "experts": stacks,
                "unreached": _unreached(opened, reached),
                "loss": _common_loss(opened),
            },
        )
    return MergedCalibration(
        output=output,
        parts=len(parts),
        samples=sum(record.samples for record in manifest.data),
        tokens=sum(record.tokens for record in manifest.data),
        layers=len(reached),
        grams=len(grams),
        gradients=len(gradients),
    )


def _refuse_same_samples(parts: Sequence[Calibration]) -> None:
    """The same file and seed choose the same samples, which would then count twice."""
    seen: dict[tuple[str, int], Path] = {}
    for part in parts:
        for record in part.manifest.data:
            other = seen.get((record.hash, record.seed))
            if other is not None:
                raise MismatchError(
                    f"{part.folder} and {other} were both made from samples of {record.file} that --seed {record.seed} "
                    "chose; merge calibrations of different data, or calibrate with another --seed"
                )
            seen[record.hash, record.seed] = part.folder


def _common_layers(parts: Sequence[Calibration]) -> dict[str, CalibratedLayer]:
    return _agreeing(parts, [part.manifest.layers for part in parts])


def _common_stacks(parts: Sequence[Calibration]) -> dict[str, CalibratedStack]:
    return _agreeing(parts, [part.stacks for part in parts])


def _agreeing(parts: Sequence[Calibration], found: Sequence[Mapping[str, Record]]) -> dict[str, Record]:
    """What any part has, by name; the weights must be the same wherever several have it."""
    merged: dict[str, Record] = {}
    for part, records in zip(parts, found, strict=True):
        for name, record in records.items():
            if merged.setdefault(name, record) != record:
                raise MismatchError(
                    f"{part.folder} was calibrated with another weight of {name} than {parts[0].folder}; "
                    "only calibrations of the same base can be merged"
                )
    return merged


def _unreached(parts: Sequence[Calibration], reached: Collection[str]) -> list[str]:
    """Layers that no part's data reached."""
    return [name for name in dict.fromkeys(n for part in parts for n in part.manifest.unreached) if name not in reached]


def _entries(parts: Sequence[Calibration]) -> list[GramEntry]:
    """One Gram per set of layers that share theirs in every part."""
    reached = {part.folder: frozenset(part.reached) for part in parts}
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in dict.fromkeys(name for part in parts for name in part.reached):
        shared = tuple(part.record(name).tensor if name in reached[part.folder] else None for part in parts)
        groups.setdefault(shared, []).append(name)
    entries = []
    for names in groups.values():
        records = [part.record(names[0]) for part in parts if names[0] in reached[part.folder]]
        _same_side(names[0], [record.side for record in records], "statistics")
        tokens = sum(record.tokens for record in records)
        entries.append(GramEntry(tuple(names), records[0].side, records[0].features, tokens))
    return entries


def _gradients(parts: Sequence[Calibration]) -> list[GramEntry]:
    """One gradient Gram per layer that any part has one of."""
    records: dict[str, list[GradientRecord]] = {}
    for part in parts:
        for record in part.manifest.grams:
            if isinstance(record, GradientRecord):
                records.setdefault(record.layers[0], []).append(record)
    entries = []
    for name, found in records.items():
        _same_side(name, [record.side for record in found], "gradients")
        side: Side = "input" if found[0].side == "input_gradient" else "output"
        tokens, energy = sum(record.tokens for record in found), sum(record.energy for record in found)
        entries.append(GramEntry((name,), side, found[0].features, tokens, "gradient", energy))
    return entries


def _same_side(layer: str, sides: Sequence[str], what: str) -> None:
    if len(set(sides)) > 1:
        raise UnsupportedError(
            f"{layer} has input-side {what} in one calibration and output-side in another; calibrate again with the "
            "same --targets"
        )


def _matrix(part: Calibration, entry: GramEntry) -> torch.Tensor:
    """What a part adds to an entry `(features, features)`; a zero that broadcasts if it has nothing."""
    name = entry.layers[0]
    if entry.kind == "gradient":
        gradient = part.gradient(name)
        return torch.zeros(()) if gradient is None else gradient.matrix
    return part.gram(name).matrix if part.has(name) else torch.zeros(())


def _common_loss(parts: Sequence[Calibration]) -> Loss | None:
    """What the gradients are of; None without any."""
    losses = {part.loss: part.folder for part in parts if part.loss is not None}
    if len(losses) > 1:
        (first, one), (second, other) = list(losses.items())[:2]
        raise UnsupportedError(
            f"{one} holds gradients of the loss {first!r} and {other} of {second!r}, which do not add up; calibrate "
            "again with the same kind of data"
        )
    return next(iter(losses), None)
