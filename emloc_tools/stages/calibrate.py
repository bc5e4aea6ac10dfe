"""calibrate: second moments of every linear layer's data, from samples of the downstream task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_tools.data.batches import count_samples, count_tokens, load_batches
from emloc_tools.files.calibration import GramSpool, write_calibration
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import BaseRecord, CalibratedLayer, CalibratedStack, DataRecord, file_hash, made_by
from emloc_tools.files.tensors import MAX_SHARD_SIZE
from emloc_tools.models.base import choose_device, open_base, weight_name
from emloc_tools.models.layers import select_layers
from emloc_tools.records import Layer, Progress, silent
from emloc_tools.stages.gradient_sums import GradientSums, batch_loss, loss_of
from emloc_tools.stages.gram_sums import GramSums
from emloc_tools.stages.passes import activation_bytes, call_of, require_room, sparing_options
from emloc_tools.stages.refusals import require_apart, require_original, require_own_weights
from emloc_tools.streaming.backward import BackwardLockStep
from emloc_tools.streaming.padding import Padding
from emloc_tools.streaming.stream import LockStep


@dataclass(frozen=True)
class CalibrationResult:
    """What `calibrate` did. `tokens` counts real tokens of all samples, `bytes_read` the checkpoint's bytes.

    `grams` are those of the data, `gradients` those of the loss gradient, `gram_bytes` the size of all.
    """

    output: Path
    samples: int
    tokens: int
    layers: int
    grams: int
    gradients: int
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
    gradients: bool = False,
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

    With `gradients` the samples also run backward, and the second moments of the loss gradient at every layer are kept
    as well. Every weight is then read twice at most, and activations pass through a temporary file beside the output
    (see `passes.activation_bytes`). The loss is that of the next token over the samples' targets (a text, a chat, the
    completion of a prompt), for ready inputs with labels, or of pairs to match, that of the model, and for those with a
    `target` the squared error of the model's output.

    Raises `InputError` for unusable paths, data or patterns and for too full a disk, `NumericalError` for NaN or
    infinity, `UnsupportedError` for gradients of a model without a loss on such data.
    """
    require_original(base)
    require_apart(output, [Path(base), data])
    check_output(output, overwrite=overwrite)
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
    loss = loss_of(batches, opened.architecture, opened.config) if gradients else None
    with new_folder(output, overwrite=overwrite) as folder, opened.tensors:
        weights = opened.weights(layers)
        require_own_weights(layers, weights.source_of)
        if loss is not None:
            require_room(folder, output, activation_bytes(opened.model, weights, batches), fewer="--samples")
        spool = GramSpool(folder / "spool")
        options = sparing_options(opened.model, layers, batches, loss=gradients)
        calls = [call_of(opened.model, batch, torch.device(device), options) for batch in batches]
        stream = (
            LockStep(opened.model, weights, device=device)
            if loss is None
            else BackwardLockStep(opened.model, weights, layers, spill=folder, device=device)
        )
        padding = Padding(stream, batches)
        statistics = GramSums(stream, layers, padding, spool, progress)
        if isinstance(stream, BackwardLockStep):
            sums = GradientSums(stream, padding, spool, progress)
            stream.run_backward(calls, lambda index, result: batch_loss(batches[index], result, opened.model))
            sums.finish()
        else:
            stream.run(calls)
        statistics.finish()
        padding.close()
        stream.close()
        reached = statistics.reached()
        manifest = write_calibration(
            folder,
            [*statistics.entries(), *spool.gradients.values()],
            lambda entry: (
                spool.read(entry.layers, "gradient") if entry.kind == "gradient" else statistics.packed(entry)
            ),
            max_shard_size=max_shard_size,
            fields={
                "made_by": made_by(command, opened.library),
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
                "experts": {
                    layer.name: _calibrated_stack(layer, weights.hashes[weight_name(layer)])
                    for layer in layers
                    if layer.experts is not None and any(member.name in reached for member in layer.members())
                },
                "unreached": [
                    member.name for layer in layers for member in layer.members() if member.name not in reached
                ],
                "loss": loss,
            },
        )
        spool.remove()
    return CalibrationResult(
        output=output,
        samples=manifest.data[0].samples,
        tokens=manifest.data[0].tokens,
        layers=len(reached),
        grams=len(manifest.grams) - len(spool.gradients),
        gradients=len(spool.gradients),
        gram_bytes=sum(record.features * (record.features + 1) * 2 for record in manifest.grams),
        unreached=manifest.unreached,
        bytes_read=opened.tensors.bytes_read,
    )


def _calibrated_stack(layer: Layer, weight_hash: str) -> CalibratedStack:
    assert layer.experts is not None  # a stack
    return CalibratedStack(**_calibrated(layer, weight_hash).model_dump(), experts=layer.experts)


def _calibrated(layer: Layer, weight_hash: str) -> CalibratedLayer:
    return CalibratedLayer(
        out_features=layer.out_features,
        in_features=layer.in_features,
        orientation=layer.orientation,
        has_bias=layer.has_bias,
        weight_hash=weight_hash,
    )
