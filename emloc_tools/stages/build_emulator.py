"""build-emulator: replace linear layers by the low-rank factors that best keep their outputs on calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from emloc_tools.errors import InputError, MismatchError, NumericalError
from emloc_tools.files.calibration import Calibration
from emloc_tools.files.emulator_writer import EmulatorWriter, WrittenEmulator
from emloc_tools.files.folders import check_output, new_folder, require_folder
from emloc_tools.files.manifest import (
    BaseRecord,
    CalibrationReference,
    FactoredLayer,
    made_by,
)
from emloc_tools.files.tensors import MAX_SHARD_SIZE, TensorSpec, read_json
from emloc_tools.linalg.allocate import adaptive_ranks, uniform_ranks
from emloc_tools.linalg.lowrank import decompose, principal_directions
from emloc_tools.models.base import BaseModel, choose_device, open_base, oriented, weight_name
from emloc_tools.models.companions import copy_companions
from emloc_tools.models.layers import select_layers
from emloc_tools.models.modeling import FILE, emulator_name, modeling_source
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import Allocation, Gram, Layer, LowRank, Progress, Step, silent
from emloc_tools.stages.budget import budget_ratio


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
    allocation: Allocation = "uniform",
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
    parameters), `size` (all bytes) or `ranks` (a rank per layer; all others stay dense). `allocation="adaptive"` spends
    the same budget across layers by error removed per value, at the cost of reading the weights twice. Without
    `calibration` every layer gets its truncated SVD. `dtype` of the factors: that of the base's weights by default.
    `eigen_dtype` is the precision of the decompositions.

    Raises `InputError` for unusable options, `MismatchError` if the calibration belongs to another base,
    `NumericalError` for NaN or infinity.
    """
    check_output(output, overwrite=overwrite)
    opened = open_base(base, revision=revision, trust_remote_code=trust_remote_code)
    modeling, auto_map = modeling_source(opened.config, opened.architecture)
    statistics = _open_calibration(calibration)
    layers = _layers(opened, statistics, targets, exclude)
    weights = opened.weights(layers)
    factory = _Factory(weights, statistics, choose_device(device), getattr(torch, eigen_dtype), progress)
    stored_dtype = _factor_dtype(weights, layers, dtype)
    specs = [TensorSpec(name, *weights.stored_spec(name)) for name in weights.stored_names()]
    given = ranks is not None
    if ranks is None:
        chosen = {weight_name(layer) for layer in layers}
        dense = [spec for spec in specs if spec.name not in chosen]
        ratio = budget_ratio(dense, layers, stored_dtype, ratio=ratio, params=params, size=size)
        ranks = uniform_ranks(layers, ratio)
        if allocation == "adaptive":
            shares = {layer.name: factory.shares(layer, len(layers)) for layer in layers if layer.name in ranks}
            ranks = adaptive_ranks(layers, shares, ratio)
    factored = {layer.name: layer for layer in layers if layer.name in ranks}
    if not factored:
        raise InputError("no layer would become smaller; choose a lower --ratio or other --targets")
    replaced = {weight_name(layer) for layer in factored.values()}
    with new_folder(output, overwrite=overwrite) as folder, opened.tensors:
        writer = EmulatorWriter(
            folder,
            dense=[spec for spec in specs if spec.name not in replaced],
            factored={name: (layer.out_features, layer.in_features, ranks[name]) for name, layer in factored.items()},
            dtype=stored_dtype,
            max_shard_size=max_shard_size,
        )
        try:
            for spec in specs:
                if spec.name not in replaced:
                    writer.write_dense(spec.name, weights.load([spec.name])[spec.name])
            records = {}
            for layer in factored.values():
                low_rank = factory.decompose(layer, ranks[layer.name], len(factored))
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
                    "made_by": made_by(command),
                    "base": BaseRecord(id=base, revision=opened.source.revision, architecture=opened.architecture),
                    "calibration": statistics
                    and CalibrationReference(hash=statistics.hash, data=statistics.manifest.data),
                    "allocation": "given" if given else allocation,
                    "eigen_dtype": eigen_dtype,
                    "base_parameters": sum(torch.Size(spec.shape).numel() for spec in specs),
                    "layers": records,
                    "ignored_tensors": weights.ignored,
                },
            )
        finally:
            writer.close()
    left_dense = tuple(layer.name for layer in layers if layer.name not in factored)
    return WrittenEmulator(output, manifest, writer.tensors.total_size, left_dense)


class _Factory:
    """Reads a layer's weight and Gram, checks that they belong together, and decomposes."""

    def __init__(
        self,
        weights: ModelWeights,
        calibration: Calibration | None,
        device: str,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self._weights, self._calibration, self._device, self._dtype = weights, calibration, device, dtype
        self._progress, self._done = progress, {"ranks": 0, "factors": 0}

    def shares(self, layer: Layer, total: int) -> torch.Tensor:
        """The parts of the layer's output energy along its principal directions, descending, float64."""
        energies, _ = principal_directions(self._weight(layer), self._gram(layer), dtype=self._dtype)
        self._report("ranks", total, layer.name)
        energies = energies.double().cpu()
        return energies / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def decompose(self, layer: Layer, rank: int, total: int) -> LowRank:
        """The layer's factors."""
        try:
            low_rank = decompose(self._weight(layer), rank, self._gram(layer), dtype=self._dtype)
        except NumericalError as error:
            raise NumericalError(f"layer {layer.name}: {error}") from error
        self._report("factors", total, f"{layer.name}: rank {rank}, relative error {low_rank.relative_error:.4f}")
        return low_rank

    def _weight(self, layer: Layer) -> torch.Tensor:
        name = weight_name(layer)
        weight = self._weights.load([name])[name]
        if self._calibration is not None:
            expected = self._calibration.manifest.layers[layer.name].weight_hash
            if self._weights.hashes[name] != expected:
                raise MismatchError(
                    f"{name} is not the weight that was calibrated: the calibration in {self._calibration.folder} "
                    f"was made from {self._calibration.manifest.base.id}; use that base, or calibrate this one"
                )
        return oriented(layer, weight).to(self._device)

    def _gram(self, layer: Layer) -> Gram | None:
        return None if self._calibration is None else self._calibration.gram(layer.name)

    def _report(self, title: str, total: int, detail: str) -> None:
        self._done[title] += 1
        self._progress(Step(title, self._done[title], total, detail))


def _open_calibration(folder: Path | None) -> Calibration | None:
    if folder is None:
        return None
    require_folder(folder, "a calibration")
    return Calibration(folder)


def _layers(
    opened: BaseModel, calibration: Calibration | None, targets: str | None, exclude: str | None
) -> list[Layer]:
    """The chosen layers; with a calibration those that it holds, which must have the base's shapes."""
    if calibration is None:
        return select_layers(opened.model, targets=targets, exclude=exclude)
    available = {layer.name: layer for layer in select_layers(opened.model, targets=targets or ".")}
    for name, record in calibration.manifest.layers.items():
        layer = available.get(name)
        if layer is None and targets is not None:
            continue
        if layer is None or (layer.out_features, layer.in_features) != (
            record.out_features,
            record.in_features,
        ):
            raise MismatchError(
                f"the calibration in {calibration.folder} was made from {calibration.manifest.base.id}; its layer "
                f"{name} ({record.out_features} x {record.in_features}) is not in {opened.source.id}"
            )
    chosen = set(calibration.manifest.layers)
    if exclude is not None:
        chosen &= {layer.name for layer in select_layers(opened.model, targets=targets or ".", exclude=exclude)}
    layers = [layer for layer in available.values() if layer.name in chosen]
    if not layers:
        raise InputError(f"no layer chosen by --targets and --exclude is in the calibration in {calibration.folder}")
    return layers


def _factor_dtype(weights: ModelWeights, layers: Sequence[Layer], dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    stored, _ = weights.stored_spec(weight_name(layers[0]))
    return stored


def _config(opened: BaseModel, dtype: str) -> dict[str, object]:
    """The base's config.json as it is, but for a dtype that the user chose."""
    config = read_json(opened.source.folder / "config.json", "base config")
    if dtype != "auto":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
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
