"""truncate: a smaller emulator from a larger one, without a new decomposition."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from emloc_tools.errors import InputError
from emloc_tools.files.emulator import FACTORS, MANIFEST, Emulator
from emloc_tools.files.emulator_writer import EmulatorWriter, WrittenEmulator
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import FactoredLayer, made_by
from emloc_tools.files.tensors import MAX_SHARD_SIZE, TensorSpec, read_json
from emloc_tools.linalg.allocate import adaptive_ranks, largest_useful_rank, uniform_ranks
from emloc_tools.linalg.lowrank import truncate as truncate_factors
from emloc_tools.models.companions import copy_companions
from emloc_tools.models.modeling import FILE
from emloc_tools.models.source import Source
from emloc_tools.records import Layer, Progress, Step, silent
from emloc_tools.stages.budget import budget_ratio
from emloc_tools.stages.refusals import require_apart, require_artifact

INHERITED = ("base", "calibration", "allocation", "eigen_dtype", "base_parameters", "ignored_tensors")


def truncate(
    *,
    emulator: Path,
    output: Path,
    ratio: float | None = None,
    params: int | None = None,
    size: int | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.truncate",
    progress: Progress = silent,
) -> WrittenEmulator:
    """Write a smaller emulator: factors are sorted, so each layer's are a prefix of the larger emulator's.

    Equals, up to rounding, a new build of that size. Layers that are dense stay dense.

    The budget is given as for `build_emulator`, and is spent by the allocation of the larger emulator: uniform, or
    adaptive by the energies that S holds. Errors in the manifest follow from S, to the precision of its dtype.

    Raises `InputError` if the budget is not below the emulator's own size.
    """
    check_output(output, overwrite=overwrite)
    require_artifact(emulator, MANIFEST, "an emulator")
    require_apart(output, [emulator])
    with contextlib.ExitStack() as stack:
        larger = stack.enter_context(contextlib.closing(Emulator(emulator)))
        layers = [_layer(name, record) for name, record in larger.layers.items()]
        replaced = {f"{layer.name}.{part}" for layer in layers for part in (*FACTORS, "weight")}
        dense = [larger.tensors.spec(name) for name in larger.tensors.names() if name not in replaced]
        dtype = larger.tensors.spec(f"{layers[0].name}.U").dtype
        weights = {
            layer.name: (layer, TensorSpec(f"{layer.name}.weight", dtype, (layer.out_features, layer.in_features)))
            for layer in layers
        }
        ranks = _ranks(larger, layers, budget_ratio(dense, weights, dtype, ratio=ratio, params=params, size=size))
        if all(ranks[layer.name] == larger.layers[layer.name].rank for layer in layers):
            raise InputError(
                f"the emulator in {emulator} is not larger than that: no layer would lose a direction; choose less, or "
                "build a larger emulator from the base"
            )
        folder = stack.enter_context(new_folder(output, overwrite=overwrite))
        writer = stack.enter_context(
            contextlib.closing(
                EmulatorWriter(
                    folder,
                    dense=dense,
                    factored={
                        layer.name: (layer.out_features, layer.in_features, ranks[layer.name]) for layer in layers
                    },
                    dtype=dtype,
                    max_shard_size=max_shard_size,
                )
            )
        )
        for spec in dense:
            writer.write_dense(spec.name, larger.read(spec.name))
        records = {}
        for number, layer in enumerate(layers, 1):
            U, S, Vh = larger.factors(layer.name)
            writer.write_factors(layer.name, *truncate_factors(U, S, Vh, ranks[layer.name]))
            records[layer.name] = _record(larger.layers[layer.name], S, ranks[layer.name])
            error = records[layer.name].relative_error
            detail = f"{layer.name}: rank {ranks[layer.name]}, relative error {error:.3f}"
            progress(Step("truncate", number, len(layers), detail))
        copy_companions(Source(str(emulator), None, emulator), folder)
        config = read_json(emulator / "config.json", "E7")
        manifest = writer.finish(
            base_config=config,
            class_name=config["architectures"][0],
            auto_map=config["auto_map"],
            modeling_file=FILE,
            modeling=(emulator / f"{FILE}.py").read_text(encoding="utf-8"),
            fields={
                **{key: getattr(larger.manifest, key) for key in INHERITED},
                "made_by": made_by(command),
                "layers": records,
            },
            weighting=larger.weighting,
        )
    return WrittenEmulator(output, manifest, writer.tensors.total_size)


def _layer(name: str, record: FactoredLayer) -> Layer:
    return Layer(name, record.out_features, record.in_features, record.orientation, has_bias=False)


def _ranks(larger: Emulator, layers: list[Layer], ratio: float) -> Mapping[str, int]:
    """Ranks at a uniform ratio, never above those there are; a layer that a build would keep dense stays factored."""
    wanted = uniform_ranks(layers, ratio)
    if larger.manifest.allocation == "adaptive":
        weighting = larger.weighting
        sharing = [layer for layer in layers if weighting is None or layer.name in weighting.sensitivity]
        wanted |= adaptive_ranks(sharing, {layer.name: _gains(larger, layer.name) for layer in sharing}, ratio)
    useful = {layer.name: max(1, largest_useful_rank(layer)) for layer in layers}
    return {name: min(record.rank, wanted.get(name, useful[name])) for name, record in larger.layers.items()}


def _gains(larger: Emulator, name: str) -> torch.Tensor:
    """What the directions of a layer are worth, as when the emulator was built."""
    _, S, _ = larger.factors(name)
    energies = _energies(larger.layers[name], S)
    if larger.weighting is not None:
        return energies * larger.weighting.sensitivity[name]
    return energies / max(larger.layers[name].total_energy, torch.finfo(torch.float64).tiny)


def _energies(record: FactoredLayer, S: torch.Tensor) -> torch.Tensor:
    """The energies per token of a layer's directions, `(k,)` in float64: S², but 0 where S holds no energy."""
    energies = S.double() ** 2
    energies[record.energetic :] = 0
    return energies


def _record(larger: FactoredLayer, S: torch.Tensor, rank: int) -> FactoredLayer:
    """The record of a truncated layer: the discarded part of S² adds to the error that was there."""
    dropped = float(_energies(larger, S)[rank:].sum())
    tail = larger.relative_error**2 * larger.total_energy + dropped
    error = min(1.0, tail / larger.total_energy) ** 0.5 if larger.total_energy > 0 else 0.0
    floored = max(0, larger.floored - (larger.rank - rank))
    changes = {
        "rank": rank,
        "relative_error": error,
        "energetic": min(rank, larger.energetic),
        "floored": floored,
    }
    return larger.model_copy(update=changes)
