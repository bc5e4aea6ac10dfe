"""merge-calibration: add up calibrations of the same base that were made from different data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_tools.errors import InputError, MismatchError, UnsupportedError
from emloc_tools.files.calibration import MANIFEST, Calibration, GramEntry, write_calibration
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import CalibratedLayer, made_by
from emloc_tools.files.packing import pack_lower
from emloc_tools.files.tensors import MAX_SHARD_SIZE
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.refusals import require_apart, require_artifact


@dataclass(frozen=True)
class MergeResult:
    """What `merge_calibration` wrote."""

    output: Path
    parts: int
    samples: int
    tokens: int
    layers: int
    grams: int


def merge_calibration(
    *,
    parts: Sequence[Path],
    output: Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.merge_calibration",
    progress: Progress = silent,
) -> MergeResult:
    """Write the sum of two or more calibrations, one Gram in memory at a time.

    A layer that only some parts reached keeps what those have. Raises `MismatchError` if the parts come from
    different weights or two of them from the same samples, `UnsupportedError` if a layer has input-side statistics in
    one part and output-side in another.
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
        layers = _common_layers(opened)
        entries = _entries(opened, layers)
        done = itertools.count(1)

        def add_up(entry: GramEntry) -> torch.Tensor:
            total = torch.zeros(entry.features, entry.features)
            for part in opened:
                if entry.layers[0] in part.manifest.layers:
                    total += part.gram(entry.layers[0]).matrix
            progress(Step("merge", next(done), len(entries), entry.layers[0]))
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
                "unreached": _unreached(opened, layers),
            },
        )
    return MergeResult(
        output=output,
        parts=len(parts),
        samples=sum(record.samples for record in manifest.data),
        tokens=sum(record.tokens for record in manifest.data),
        layers=len(layers),
        grams=len(entries),
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
    layers: dict[str, CalibratedLayer] = {}
    for part in parts:
        for name, layer in part.manifest.layers.items():
            if layers.setdefault(name, layer) != layer:
                raise MismatchError(
                    f"{part.folder} was calibrated with another weight of {name} than {parts[0].folder}; "
                    "only calibrations of the same base can be merged"
                )
    return layers


def _unreached(parts: Sequence[Calibration], layers: Mapping[str, CalibratedLayer]) -> list[str]:
    """Layers that no part's data reached."""
    return [name for name in dict.fromkeys(n for part in parts for n in part.manifest.unreached) if name not in layers]


def _entries(parts: Sequence[Calibration], layers: Mapping[str, CalibratedLayer]) -> list[GramEntry]:
    """One Gram per set of layers that share theirs in every part."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in layers:
        shared = tuple(part.record(name).tensor if name in part.manifest.layers else None for part in parts)
        groups.setdefault(shared, []).append(name)
    entries = []
    for names in groups.values():
        records = [part.record(names[0]) for part in parts if names[0] in part.manifest.layers]
        if len({record.side for record in records}) > 1:
            raise UnsupportedError(
                f"{names[0]} has input-side statistics in one calibration and output-side in another; calibrate again "
                "with the same --targets"
            )
        tokens = sum(record.tokens for record in records)
        entries.append(GramEntry(tuple(names), records[0].side, records[0].features, tokens))
    return entries
