"""build-emulator: replace linear layers by the low-rank factors that best keep their outputs on calibration data."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.calibration import MANIFEST as CALIBRATION
from emloc_tools.files.calibration import Calibration
from emloc_tools.files.emulator import FLOATS
from emloc_tools.files.emulator_writer import EmulatorWriter, WrittenEmulator
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import (
    BaseRecord,
    CalibrationReference,
    FactoredLayer,
    FactoredStack,
    WeightingRecord,
    made_by,
)
from emloc_tools.files.tensors import MAX_SHARD_SIZE, TensorSpec, read_json
from emloc_tools.linalg.weighting import DAMPING
from emloc_tools.models.base import BaseModel, choose_device, open_base, weight_name
from emloc_tools.models.companions import copy_companions
from emloc_tools.models.layers import select_layers
from emloc_tools.models.modeling import FILE, emulator_name, modeling_source
from emloc_tools.models.own_code import own_code
from emloc_tools.models.skeleton import RESCALING
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import Allocation, Layer, LowRank, Progress, Weighting, silent
from emloc_tools.stages.budget import budget_ratio
from emloc_tools.stages.build_choices import check_ranks, chosen_layers, is_weighted, spend
from emloc_tools.stages.decomposer import Decomposer
from emloc_tools.stages.refusals import require_apart, require_artifact, require_original, require_own_weights


def build_emulator(
    *,
    base: str,
    output: Path,
    calibration: Path | None = None,
    revision: str | None = None,
    ratio: float | None = None,
    params: int | None = None,
    size: int | None = None,
    ranks: Mapping[str, int] | None = None,
    weighting: Weighting | None = None,
    damping: float | None = None,
    allocation: Allocation | None = None,
    targets: str | None = None,
    exclude: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    eigen_dtype: str = "float64",
    max_shard_size: int = MAX_SHARD_SIZE,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.build_emulator",
    progress: Progress = silent,
) -> WrittenEmulator:
    """Write an emulator of `base` to `output`, reading one weight at a time.

    Exactly one of these sets its size: `ratio` (the fraction 0–1 of each chosen layer's values), `params` (all
    parameters), `size` (all bytes) or `ranks` (a rank per layer; all others stay dense). Without `calibration` every
    layer gets its truncated SVD. `dtype` of the factors: that of the base's weights by default. `eigen_dtype` is the
    precision of the decompositions.

    `weighting="gradient"` measures errors by what the loss minds, with `damping` (0.05 by default) of the mean squared
    gradient added to every direction, and is the default where the calibration has gradients of a chosen layer;
    `"none"` measures the layers' outputs alone. `allocation="adaptive"` spends the budget across layers where a value
    gains the most, at the cost of reading the weights twice, and is the default with that weighting; layers without
    gradients then keep to the ratio, and are not weighted. `"uniform"` gives every layer the same ratio. The paper has
    `weighting="none"` and `allocation="uniform"`.

    Raises `InputError` for unusable options, `MismatchError` if the calibration belongs to another base,
    `NumericalError` for NaN or infinity.
    """
    check_output(output, overwrite=overwrite)
    require_original(base)
    require_apart(output, [Path(base), *([calibration] if calibration else [])])
    device = choose_device(device)
    with contextlib.ExitStack() as stack:
        statistics = None if calibration is None else stack.enter_context(_open_calibration(calibration))
        opened = open_base(base, revision=revision, trust_remote_code=trust_remote_code)
        stack.enter_context(opened.tensors)
        layers = chosen_layers(opened, statistics, targets, exclude)
        weights = opened.weights(layers)
        modeling, auto_map, code = _modeling(opened, layers, weights, fused=_is_fused(opened, weights, layers))
        require_own_weights(layers, weights.source_of)
        specs = {name: TensorSpec(name, *weights.stored_spec(name)) for name in weights.stored_names()}
        stored_dtype = _factor_dtype(specs[weight_name(layers[0])], dtype)
        weighted = is_weighted(weighting, damping, layers, statistics)
        damping = DAMPING if damping is None else damping
        decomposer = Decomposer(
            weights,
            statistics,
            device,
            getattr(torch, eigen_dtype),
            stored_dtype,
            progress,
            weighted=weighted,
            damping=damping,
        )
        chosen_by: Allocation | Literal["given"] = "given"
        if ranks is not None:
            check_ranks(ranks, layers, any(value is not None for value in (ratio, params, size, allocation)))
        else:
            chosen_by = allocation or ("adaptive" if weighted else "uniform")
            of_layers = {layer.name: (layer, specs[weight_name(layer)]) for layer in layers}
            chosen = {weight_name(layer) for layer in layers}
            dense = [spec for spec in specs.values() if spec.name not in chosen]
            uniform = budget_ratio(dense, of_layers, stored_dtype, ratio=ratio, params=params, size=size)
            comparable = None
            if statistics and weighted:
                comparable = frozenset(layer.name for layer in layers if statistics.has_gradients(layer))
            ranks = spend(layers, uniform, chosen_by, decomposer.gains, comparable)
        factored = {layer.name: layer for layer in layers if layer.name in ranks}
        replaced = {weight_name(layer) for layer in factored.values()}
        folder = stack.enter_context(new_folder(output, overwrite=overwrite))
        writer = stack.enter_context(
            contextlib.closing(
                EmulatorWriter(
                    folder,
                    dense=[spec for spec in specs.values() if spec.name not in replaced],
                    factored={
                        name: (layer.out_features, layer.in_features, ranks[name])
                        for name, layer in factored.items()
                        if layer.experts is None
                    },
                    stacks={
                        name: (layer.experts, layer.out_features, layer.in_features, ranks[name])
                        for name, layer in factored.items()
                        if layer.experts is not None
                    },
                    dtype=stored_dtype,
                    max_shard_size=max_shard_size,
                    library=opened.library,
                )
            )
        )
        for name in specs:
            if name not in replaced:
                writer.write_dense(name, weights.load([name])[name])
        records: dict[str, FactoredLayer] = {}
        stacks: dict[str, FactoredStack] = {}
        for layer in factored.values():
            if layer.experts is not None:
                factors = decomposer.decompose_stack(layer, ranks[layer.name], len(factored))
                writer.write_factors(layer.name, factors.U, factors.S, factors.Vh)
                stacks[layer.name] = factors.record(layer, weights.hashes[weight_name(layer)])
                continue
            low_rank = decomposer.decompose(layer, ranks[layer.name], len(factored))
            writer.write_factors(layer.name, low_rank.U, low_rank.S, low_rank.Vh)
            records[layer.name] = _record(layer, low_rank, weights.hashes[weight_name(layer)])
        copy_companions(opened.source, folder)
        manifest = writer.finish(
            base_config=_config(opened, dtype),
            class_name=emulator_name(opened.architecture),
            auto_map=auto_map,
            modeling_file=FILE,
            modeling=modeling,
            fields={
                "made_by": made_by(command, opened.library),
                "base": BaseRecord(id=base, revision=opened.source.revision, architecture=opened.architecture),
                "calibration": statistics and CalibrationReference(hash=statistics.hash, data=statistics.manifest.data),
                "allocation": chosen_by,
                "eigen_dtype": eigen_dtype,
                "base_parameters": sum(torch.Size(spec.shape).numel() for spec in specs.values()),
                "layers": records,
                "experts": stacks,
                "ignored_tensors": weights.ignored,
            },
            code=code,
            weighting=WeightingRecord(damping=damping, sensitivity=decomposer.sensitivity) if weighted else None,
        )
    left_dense = tuple(layer.name for layer in layers if layer.name not in factored)
    return WrittenEmulator(output, manifest, writer.tensors.total_size, left_dense)


def _open_calibration(folder: Path) -> contextlib.closing[Calibration]:
    require_artifact(folder, CALIBRATION, "a calibration")
    return contextlib.closing(Calibration(folder))


def _is_fused(opened: BaseModel, weights: ModelWeights, layers: Sequence[Layer]) -> bool:
    """Whether the emulator will hold experts as transformers does from version 5 on."""
    stacks = [layer for layer in select_layers(opened.model, targets=".") if layer.experts is not None]
    converted = any(weights.copied_from(weights.source_of[stack.name]) is None for stack in stacks)
    return converted or any(layer.experts is not None for layer in layers)


def _modeling(
    opened: BaseModel, layers: Sequence[Layer], weights: ModelWeights, *, fused: bool
) -> tuple[str, dict[str, str], dict[str, bytes]]:
    """The text of the modeling file, the `auto_map`, and Python files of the base, for the library of the base."""
    if opened.library == "diffusers":
        from emloc_tools.models import diffusers_modeling  # imports diffusers, which only such bases need

        return *diffusers_modeling.modeling_source(opened.architecture), {}
    if opened.has_own_code:
        own = own_code(opened.source, opened.architecture)
        return own.modeling, own.auto_map, own.files
    names = [layer.name for layer in layers]
    return *modeling_source(opened.config, opened.architecture, names, weights.stored_names(), fused=fused), {}


def _factor_dtype(weight: TensorSpec, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if weight.dtype not in FLOATS:
        raise UnsupportedError(f"{weight.name} is stored as {weight.dtype}; choose the factors' precision by --dtype")
    return weight.dtype


def _config(opened: BaseModel, dtype: str) -> dict[str, object]:
    """The base's config.json as it is, but for a dtype that the user chose, and names that transformers 4 reads.

    What is quantised in the base is not in the emulator, and RWKV is not to rescale its weights there.
    transformers 5 saves rotary settings under `rope_parameters`. Version 4 does not know that name, and would take
    its defaults without a word.
    """
    config = read_json(opened.source.folder / "config.json", "base config")
    if opened.dequantised:
        del config["quantization_config"]
    if config.get(RESCALING):
        config[RESCALING] = 0
    if dtype != "auto" and opened.library == "transformers":  # diffusers takes it from whoever loads the model
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return config


def _record(layer: Layer, low_rank: LowRank, weight_hash: str) -> FactoredLayer:
    return FactoredLayer(
        out_features=layer.out_features,
        in_features=layer.in_features,
        orientation=layer.orientation,
        rank=low_rank.rank,
        weight_hash=weight_hash,
        relative_error=low_rank.relative_error,
        total_energy=float(low_rank.energies.sum()),
        energetic=low_rank.energetic,
        floored=low_rank.floored,
    )
