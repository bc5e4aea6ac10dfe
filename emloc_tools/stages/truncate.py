"""truncate: a smaller emulator from a larger one, without a new decomposition."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from emloc_tools.errors import InputError
from emloc_tools.files.emulator import MANIFEST, Emulator, factor_names
from emloc_tools.files.emulator_writer import EmulatorWriter, WrittenEmulator
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import FactoredExpert, FactoredLayer, FactoredStack, made_by
from emloc_tools.files.tensors import MAX_SHARD_SIZE, TensorSpec, read_json
from emloc_tools.linalg.allocate import adaptive_ranks, largest_useful_rank, uniform_ranks
from emloc_tools.linalg.lowrank import truncate as truncate_factors
from emloc_tools.models.companions import copy_companions
from emloc_tools.models.modeling import FILE, emulator_name
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
        layers = [_layer(name, record) for name, record in _records(larger).items()]
        replaced = {f"{name}.weight" for name in larger.layers} | set(larger.stacks)
        replaced |= {tensor for layer in layers for tensor in factor_names(layer.name, stack=layer.experts is not None)}
        dense = [larger.tensors.spec(name) for name in larger.tensors.names() if name not in replaced]
        dtype = larger.tensors.spec(factor_names(layers[0].name, stack=layers[0].experts is not None)[0]).dtype
        weights = {layer.name: (layer, TensorSpec(f"{layer.name}.weight", dtype, _shape(layer))) for layer in layers}
        ranks = _ranks(larger, layers, budget_ratio(dense, weights, dtype, ratio=ratio, params=params, size=size))
        if all(ranks[name] == record.rank for name, record in _records(larger).items()):
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
                        name: (record.out_features, record.in_features, ranks[name])
                        for name, record in larger.layers.items()
                    },
                    stacks={
                        name: (len(record.experts), record.out_features, record.in_features, ranks[name])
                        for name, record in larger.stacks.items()
                    },
                    dtype=dtype,
                    max_shard_size=max_shard_size,
                    library=larger.library,
                )
            )
        )
        for spec in dense:
            writer.write_dense(spec.name, larger.read(spec.name))
        records: dict[str, FactoredLayer] = {}
        stacks: dict[str, FactoredStack] = {}
        for number, (name, record) in enumerate(_records(larger).items(), 1):
            U, S, Vh = larger.factors(name)
            rank = ranks[name]
            writer.write_factors(name, *truncate_factors(U, S, Vh, rank))
            if isinstance(record, FactoredStack):
                experts = [
                    expert.model_copy(update=_changes(expert, S[i], rank)) for i, expert in enumerate(record.experts)
                ]
                stacks[name] = record.model_copy(update={"rank": rank, "experts": experts})
                detail = f"{name}: {len(experts)} experts, rank {rank}"
            else:
                records[name] = record.model_copy(update={"rank": rank, **_changes(record, S, rank)})
                detail = f"{name}: rank {rank}, relative error {records[name].relative_error:.3f}"
            progress(Step("truncate", number, len(layers), detail))
        copy_companions(Source(str(emulator), None, emulator), folder)
        config = read_json(emulator / "config.json", "E7")
        manifest = writer.finish(
            base_config={key: value for key, value in config.items() if key != "quantization_config"},
            class_name=emulator_name(larger.manifest.base.architecture),
            auto_map=config["auto_map"],
            modeling_file=FILE,
            modeling=(emulator / f"{FILE}.py").read_text(encoding="utf-8"),
            fields={
                **{key: getattr(larger.manifest, key) for key in INHERITED},
                "made_by": made_by(command, larger.library),
                "layers": records,
                "experts": stacks,
            },
            weighting=larger.weighting,
            code={name: (emulator / name).read_bytes() for name in larger.code},
        )
    return WrittenEmulator(output, manifest, writer.tensors.total_size)


def _records(larger: Emulator) -> dict[str, FactoredLayer | FactoredStack]:
    return {**larger.layers, **larger.stacks}


def _layer(name: str, record: FactoredLayer | FactoredStack) -> Layer:
    experts = len(record.experts) if isinstance(record, FactoredStack) else None
    shape = (record.out_features, record.in_features, record.orientation)
    return Layer(name, *shape, has_bias=False, experts=experts)


def _shape(layer: Layer) -> tuple[int, ...]:
    shape = (layer.out_features, layer.in_features)
    return shape if layer.experts is None else (layer.experts, *shape)


def _ranks(larger: Emulator, layers: list[Layer], ratio: float) -> Mapping[str, int]:
    """Ranks at a uniform ratio, never above those there are; a layer that a build would keep dense stays factored."""
    wanted = uniform_ranks(layers, ratio)
    if larger.manifest.allocation == "adaptive":
        weighting = larger.weighting
        sharing = [
            layer
            for layer in layers
            if weighting is None or any(member.name in weighting.sensitivity for member in layer.members())
        ]
        wanted |= adaptive_ranks(sharing, {layer.name: _gains(larger, layer.name) for layer in sharing}, ratio)
    useful = {layer.name: max(1, largest_useful_rank(layer)) for layer in layers}
    return {name: min(record.rank, wanted.get(name, useful[name])) for name, record in _records(larger).items()}


def _gains(larger: Emulator, name: str) -> torch.Tensor:
    """What the directions of a layer or stack are worth, as when the emulator was built."""
    _, S, _ = larger.factors(name)
    record = _records(larger)[name]
    if isinstance(record, FactoredLayer):
        worth, total = _energies(record, S), record.total_energy
        if larger.weighting is not None:
            return worth * larger.weighting.sensitivity[name]
        return worth / max(total, torch.finfo(torch.float64).tiny)
    worth, total = torch.zeros(record.rank, dtype=torch.float64), 0.0
    for number, expert in enumerate(record.experts):
        if larger.weighting is not None:
            worth += _energies(expert, S[number]) * larger.weighting.sensitivity.get(f"{name}.{number}", 0.0)
            continue
        # The more tokens an expert saw, the more its energy per token counts; without calibration all count alike.
        tokens = expert.tokens if larger.manifest.calibration is not None else 1
        worth += tokens * _energies(expert, S[number])
        total += tokens * expert.total_energy
    return worth if larger.weighting is not None else worth / max(total, torch.finfo(torch.float64).tiny)


def _energies(record: FactoredLayer | FactoredExpert, S: torch.Tensor) -> torch.Tensor:
    """The energies per token of a matrix's directions, `(k,)` in float64: S², but 0 where S holds no energy."""
    energies = S.double() ** 2
    energies[record.energetic :] = 0
    return energies


def _changes(larger: FactoredLayer | FactoredExpert, S: torch.Tensor, rank: int) -> dict[str, float]:
    """What a lower rank changes in the record of a matrix: the discarded part of S² adds to its error."""
    dropped = float(_energies(larger, S)[rank:].sum())
    tail = larger.relative_error**2 * larger.total_energy + dropped
    error = min(1.0, tail / larger.total_energy) ** 0.5 if larger.total_energy > 0 else 0.0
    floored = max(0, larger.floored - (S.numel() - rank))
    return {"relative_error": error, "energetic": min(rank, larger.energetic), "floored": floored}
