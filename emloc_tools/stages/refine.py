"""refine: train a corrected LoRA a few steps on the base itself, which streams by and may be larger than memory."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from emloc_tools.data.batches import Batch, count_samples, count_tokens, load_batches
from emloc_tools.errors import InputError, MismatchError, NumericalError
from emloc_tools.files.adapter import CONFIG as ADAPTER
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.adapter_writer import write_refined
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_ADAPTER
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import AdapterManifest, BaseRecord, DataRecord, Refinement, file_hash, made_by
from emloc_tools.files.ready_inputs import TARGET
from emloc_tools.linalg.cross_entropy import IGNORED
from emloc_tools.models.base import BaseModel, choose_device, open_base
from emloc_tools.models.lora import LoraPair
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.candidates import Target, load_pairs, require_shapes
from emloc_tools.stages.gradient_sums import batch_loss, loss_of
from emloc_tools.stages.passes import activation_bytes, call_of, require_room, sparing_options
from emloc_tools.stages.refinement import Objective, refine_pairs
from emloc_tools.stages.refusals import require_apart, require_artifact, require_original, require_plain_lora

STEPS, SAMPLES = 8, 64  # decided by the bench, docs/transfer.md, and so are the two below
STEP_SIZE, SIZE_PER_STEP = 0.2, 0.05  # the largest step size, and what few steps have for each


@dataclass(frozen=True)
class RefinementResult:
    """What `refine` did. `losses` are those of each step's samples before the step; `bytes_read` the checkpoint's.

    `other_base` is the base that the LoRA was corrected for, if its name is not that of the one that was used.
    """

    output: Path
    losses: list[float]
    samples: int
    tokens: int
    pairs: int
    bytes_read: int
    other_base: str | None


def refine(
    *,
    base: str,
    adapter: Path,
    data: Path,
    output: Path,
    revision: str | None = None,
    steps: int = STEPS,
    samples_per_step: int = SAMPLES,
    step_size: float | None = None,
    max_length: int | None = 2048,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.refine",
    progress: Progress = silent,
) -> RefinementResult:
    """Take `steps` Adam steps of `samples_per_step` samples of `data` on the corrected LoRA, and write it to `output`.

    `data` are those that the LoRA was trained on. A step reads every weight of the base twice at most; peak memory
    holds one unit of it, the LoRA with its gradients and two moments in float32, and the activations of one batch;
    those of all samples of a step pass through a temporary file beside the output. The loss is that of
    `calibrate --gradients`. Samples are dealt in an order that `seed` shuffles, again from the start where a file has
    fewer. `step_size` is by default 0.2, and less for fewer than four steps. Rank, scaling, dtype and the files' layout
    stay.

    Raises `MismatchError` for an adapter that is not corrected, or of a base of other classes or shapes, `InputError`
    for unusable paths or data and for too full a disk, `UnsupportedError` for adapters with other tensors than pairs
    and for models without a loss on such data, `NumericalError` for NaN or infinity.
    """
    require_original(base)
    if not (adapter / DIFFUSERS_ADAPTER).is_file():
        require_artifact(adapter, ADAPTER, "a corrected adapter")
    require_apart(output, [adapter, Path(base), data])
    check_output(output, overwrite=overwrite)
    if step_size is None:
        step_size = min(STEP_SIZE, SIZE_PER_STEP * steps)
    elif not 0 < step_size < math.inf:
        raise InputError(f"--step-size {step_size:g} must be a number above 0, such as {STEP_SIZE:g}")
    device = choose_device(device)
    with contextlib.ExitStack() as stack:
        trained = stack.enter_context(contextlib.closing(open_adapter(adapter)))
        manifest = _require_corrected(trained)
        require_plain_lora(trained)
        pairs = load_pairs(trained)
        opened = open_base(base, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        stack.enter_context(opened.tensors)
        _require_base(trained, manifest, opened, pairs)
        batches = load_batches(
            data,
            opened.source,
            samples=steps * samples_per_step,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        loss_of(batches, opened.architecture, opened.config)
        # A sample whose completion was cut off has nothing to learn from.
        dealt = deal([batch for batch in batches if _counted(batch)], steps, samples_per_step, seed)
        folder = stack.enter_context(new_folder(output, overwrite=overwrite))
        weights = opened.weights()
        largest = max(activation_bytes(opened.model, weights, step) for step in dealt)
        require_room(folder, output, largest, fewer="--samples-per-step")
        refined, losses = refine_pairs(
            opened.model,
            weights,
            pairs,
            [_objective(opened.model, step, device) for step in dealt],
            step_size=step_size,
            spill=folder,
            device=device,
            progress=lambda done, total, what: progress(Step("refine", done, total, what)),
        )
        used = {id(batch): batch for step in dealt for batch in step}.values()
        record = Refinement(
            adapter=trained.hash,
            data=DataRecord(
                file=data.name,
                hash=file_hash(data),
                samples=count_samples(list(used)),
                tokens=count_tokens(list(used)),
                max_length=max_length,
                seed=seed,
            ),
            samples_per_step=min(count_samples(step) for step in dealt),
            step_size=step_size,
            losses=losses,
        )
        tensors = {
            key: _stored(trained, key, tensor)
            for module, keys in trained.loras.items()
            for key, tensor in ((keys.A, refined[module].A), (keys.B, refined[module].B))
        }
        tensors = {key: trained.read(key) for key in trained.tensors.names()} | tensors  # alphas, of diffusers
        own = BaseRecord(id=base, revision=opened.source.revision, architecture=opened.architecture)
        write_refined(folder, trained, tensors, record, base=own, made_by=made_by(command, opened.library))
    return RefinementResult(
        output=output,
        losses=losses,
        samples=record.data.samples,
        tokens=record.data.tokens,
        pairs=len(pairs),
        bytes_read=opened.tensors.bytes_read,
        other_base=None if _same_name(own, manifest.base) else manifest.base.id,
    )


def deal(batches: Sequence[Batch], steps: int, samples_per_step: int, seed: int) -> list[list[Batch]]:
    """For each step batches of at least `samples_per_step` samples, from a shuffled pile that is renewed when empty.

    A step never takes a batch twice; where all batches together have fewer samples, it takes all.
    """
    chooser = random.Random(seed)
    pile: list[Batch] = []
    dealt: list[list[Batch]] = []
    for _ in range(steps):
        step: list[Batch] = []
        while count_samples(step) < samples_per_step and len(step) < len(batches):
            if not pile:
                taken = {id(batch) for batch in step}
                pile = chooser.sample(batches, len(batches))
                pile.sort(key=lambda batch: id(batch) not in taken)  # those of this step come last
            step.append(pile.pop())
        dealt.append(step)
    return dealt


def _objective(model: nn.Module, batches: Sequence[Batch], device: str) -> Objective:
    """The mean loss of the batches over their target tokens, labels or entries."""
    options = sparing_options(model, (), batches, loss=True)
    return Objective(
        [call_of(model, batch, torch.device(device), options) for batch in batches],
        lambda index, result: batch_loss(batches[index], result, model),
        sum(_counted(batch) for batch in batches),
    )


def _counted(batch: Batch) -> int:
    """Over how many the loss of a batch is summed; 1 where the model gives a mean itself."""
    if batch.labels is not None:
        return int((batch.labels != IGNORED).sum())
    if batch.targets is not None:
        return int(batch.targets[:, 1:].sum())
    return batch.inputs[TARGET].numel() if TARGET in batch.inputs else 1


def _require_corrected(trained: Adapter) -> AdapterManifest:
    if trained.manifest is None:
        raise MismatchError(
            f"the adapter in {trained.folder} is not corrected; run emloc-tools correct on it first, and refine its "
            "output"
        )
    return trained.manifest


def _require_base(trained: Adapter, manifest: AdapterManifest, opened: BaseModel, pairs: dict[str, LoraPair]) -> None:
    expected = manifest.base
    if opened.architecture != expected.architecture:
        raise MismatchError(
            f"{opened.source.id} is a {opened.architecture}, the adapter in {trained.folder} was corrected for a "
            f"{expected.architecture} ({expected.id}); pass that base"
        )
    target = Target("base", False, opened.source, opened.model, opened.weights(), opened.tensors)
    require_shapes(target, trained.folder, pairs)


def _same_name(one: BaseRecord, other: BaseRecord) -> bool:
    """Whether both may be the same model: a folder can be moved, its own name is seldom changed."""
    names = [record.id.rstrip("/").rpartition("/")[2] for record in (one, other)]
    return names[0] == names[1] and (None in (one.revision, other.revision) or one.revision == other.revision)


def _stored(trained: Adapter, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A refined tensor in the dtype of the one that it replaces."""
    stored = tensor.to(trained.tensors.spec(key).dtype)
    if not torch.isfinite(stored).all():
        raise NumericalError(f"{key}: the refined pair exceeds {stored.dtype}; save the LoRA in float32")
    return stored
