"""calibrate: second moments of every linear layer's data, from samples of the downstream task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_tools.files.calibration import GramSpool, write_calibration
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import BaseRecord, CalibratedLayer, DataRecord, file_hash, made_by
from emloc_tools.files.tensors import MAX_SHARD_SIZE
from emloc_tools.models.base import choose_device, open_base, weight_name
from emloc_tools.models.data import Batch, count_samples, count_tokens, load_batches
from emloc_tools.models.layers import select_layers
from emloc_tools.models.stream import LockStep
from emloc_tools.records import Layer, Progress, silent
from emloc_tools.stages.gram_sums import Statistics
from emloc_tools.stages.refusals import blaming_inputs, require_apart, require_original, require_own_weights


@dataclass(frozen=True)
class CalibrationResult:
    """What `calibrate` did. `tokens` counts real tokens of all samples, `bytes_read` the checkpoint's bytes."""

    output: Path
    samples: int
    tokens: int
    layers: int
    grams: int
    gram_bytes: int
    unreached: list[str]
    bytes_read: int


def calibrate(
    *,
    base: str,
    data: Path,
    output: Path,
    revision: str | None = None,
    samples: int | None = 64,
    max_length: int | None = 2048,
    batch_size: int = 1,
    seed: int = 0,
    targets: str | None = None,
    exclude: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_shard_size: int = MAX_SHARD_SIZE,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.calibrate",
    progress: Progress = silent,
) -> CalibrationResult:
    """Run `samples` of `data` through `base` once, unit by unit, and write a calibration folder to `output`.

    Every weight is read once; peak memory holds one unit of the model, its Grams and the samples' activations. Grams
    are accumulated in float32 over real tokens. Layers that read the same tensor share a Gram of it; the smaller of
    input and output side is kept.

    Raises `InputError` for unusable paths, data or patterns, `NumericalError` for NaN or infinity.
    """
    check_output(output, overwrite=overwrite)
    require_original(base)
    require_apart(output, [Path(base), data])
    device = choose_device(device)
    opened = open_base(base, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    layers = select_layers(opened.model, targets=targets, exclude=exclude)
    batches = load_batches(
        data,
        opened.source,
        samples=samples,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    with new_folder(output, overwrite=overwrite) as folder, opened.tensors:
        weights = opened.weights(layers)
        require_own_weights(layers, weights.source_of)
        stream = LockStep(opened.model, weights, device=device)
        statistics = Statistics(stream, layers, batches, GramSpool(folder / "spool"), progress)
        options = _cheapest(opened.model, layers)
        stream.run([_forward(opened.model, batch, stream.device, options) for batch in batches])
        statistics.finish()
        stream.close()
        reached = statistics.reached()
        manifest = write_calibration(
            folder,
            statistics.entries(),
            statistics.packed,
            max_shard_size=max_shard_size,
            fields={
                "made_by": made_by(command),
                "base": BaseRecord(id=base, revision=opened.source.revision, architecture=opened.architecture),
                "data": [
                    DataRecord(
                        file=data.name,
                        hash=file_hash(data),
                        samples=count_samples(batches),
                        tokens=count_tokens(batches),
                        max_length=max_length,
                        seed=seed,
                    )
                ],
                "layers": {
                    layer.name: _calibrated(layer, weights.hashes[weight_name(layer)])
                    for layer in layers
                    if layer.name in reached
                },
                "unreached": [layer.name for layer in layers if layer.name not in reached],
            },
        )
        statistics.spool.remove()
    return CalibrationResult(
        output=output,
        samples=manifest.data[0].samples,
        tokens=manifest.data[0].tokens,
        layers=len(manifest.layers),
        grams=len(manifest.grams),
        gram_bytes=sum(record.features * (record.features + 1) * 2 for record in manifest.grams),
        unreached=manifest.unreached,
        bytes_read=opened.tensors.bytes_read,
    )


def _cheapest(model: Any, layers: Sequence[Layer]) -> dict[str, Any]:
    """Arguments that spare what nobody needs: caches, and logits of other positions unless a Gram is of the head."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not any(model.get_submodule(layer.name) is head for layer in layers):
        options["logits_to_keep"] = 1
    return {name: value for name, value in options.items() if name in accepted}


def _forward(model: nn.Module, batch: Batch, device: torch.device, options: Mapping[str, Any]) -> Callable[[], None]:
    """A call that runs one batch, with the `options` that its inputs do not set themselves."""

    def call() -> None:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        with blaming_inputs(model, inputs):
            model(**{**options, **inputs})

    return call


def _calibrated(layer: Layer, weight_hash: str) -> CalibratedLayer:
    return CalibratedLayer(
        out_features=layer.out_features,
        in_features=layer.in_features,
        orientation=layer.orientation,
        has_bias=layer.has_bias,
        weight_hash=weight_hash,
    )
