"""correct: turn a LoRA that was trained on an emulator into one for the base, and measure what it is worth there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from emloc_tools.data.batches import Batch, load_batches
from emloc_tools.errors import InputError, MismatchError
from emloc_tools.files.adapter import CONFIG as ADAPTER
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.adapter_writer import write_adapter, write_diffusers_lora
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_ADAPTER
from emloc_tools.files.diffusers_lora import DiffusersLora, open_adapter
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import BaseRecord, CorrectedLayer, DataRecord, file_hash, made_by
from emloc_tools.linalg.correction import CLAMP
from emloc_tools.models.base import choose_device, open_base
from emloc_tools.models.labels import trained_head
from emloc_tools.models.lora import LoraPair
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.candidates import Target, load_pairs, open_base_target, require_shapes
from emloc_tools.stages.corrector import (
    Corrector,
    refuse_saved_factors,
    require_same_architecture,
    require_trained_on,
)
from emloc_tools.stages.passes import blaming_inputs
from emloc_tools.stages.refusals import (
    require_apart,
    require_artifact,
    require_original,
    require_plain_lora,
)
from emloc_tools.stages.scoring import score, target_counts
from emloc_tools.stages.selection import LEAST_SAMPLES, NONE, SCALES, HeldOut, candidates, choose, scaled, table


@dataclass(frozen=True)
class CorrectionResult:
    """What the correction did, per layer, and the held-out losses where they were measured.

    `output` is None if nothing was written: for a dry run, and where a choice fell on no LoRA at all. If it fell on
    the LoRA as it was trained, `layers` is empty. `head` are the modules of a sequence classifier's head that were
    trained, as a whole or by a pair, on what the emulator gave them, and are passed on. `component` is that of a
    pipeline of diffusers that the LoRA is for.
    """

    output: Path | None
    layers: dict[str, CorrectedLayer]
    unchanged: list[str]
    heldout: HeldOut | None
    head: list[str] = field(default_factory=list)
    component: str | None = None


def correct(
    *,
    emulator: Path,
    adapter: Path,
    base: str,
    output: Path | None,
    revision: str | None = None,
    clamp: float | None = CLAMP,
    data: Path | None = None,
    select: bool = False,
    samples: int | None = None,
    max_length: int | None = 2048,
    batch_size: int = 1,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.correct",
    progress: Progress = silent,
) -> CorrectionResult:
    """Write to `output` the adapter for `base` from one trained on `emulator`; with `output=None` only report.

    Reads the weights that the adapter touches, one at a time. The input is not changed; rank, scaling and dtype stay.
    LoRA pairs on layers that the emulator kept dense, and tensors of `modules_to_save`, are passed on as they are. An
    adapter is in PEFT's files, or in the file of diffusers, and so is then what is written.

    With `data` the base is measured on these samples, which the LoRA must not have been trained on, with no adapter,
    the trained and the corrected one, in passes over its weights that all share, in `dtype`. With `select` the scales
    of `selection.SCALES` are tried, too, and what is written is chosen by the rule in `stages/selection.py`; its scale
    is multiplied into B. If no adapter at all is chosen, nothing is written: one that does nothing serves nobody, and
    the corrected one, which is worse than nothing here, is to be had without `select`.

    Raises `MismatchError` for a base or an adapter that does not belong to the emulator or is corrected already,
    `UnsupportedError` for kinds of adapters that cannot be corrected, or, with `data`, not be measured, and for models
    that do not predict the next token; `NumericalError` for NaN or infinity, `InputError` for unusable data.
    """
    require_original(base)
    require_artifact(emulator, EMULATOR, "an emulator")
    if not (adapter / DIFFUSERS_ADAPTER).is_file():
        require_artifact(adapter, ADAPTER, "a PEFT adapter")
    if output is not None:
        require_apart(output, [emulator, adapter, Path(base), *([data] if data else [])])
        check_output(output, overwrite=overwrite)
    if clamp is not None and not 0 < clamp < math.inf:
        raise InputError(f"--clamp {clamp:g} must be a number above 0, such as {CLAMP:g}, or none for no limit")
    if select and data is None:
        raise InputError("--select needs --data: samples that the LoRA was not trained on")
    device = choose_device(device)
    with contextlib.ExitStack() as stack:
        trained = stack.enter_context(contextlib.closing(open_adapter(adapter)))
        if trained.corrected:
            raise MismatchError(f"the adapter in {adapter} is corrected already; use it with its base as it is")
        bundle = stack.enter_context(contextlib.closing(Emulator(emulator)))
        require_trained_on(trained, bundle)
        require_plain_lora(trained)
        refuse_saved_factors(trained, bundle)
        pairs = {} if data is None else load_pairs(trained)
        opened = open_base(base, revision=revision, trust_remote_code=trust_remote_code)
        stack.enter_context(opened.tensors)
        require_same_architecture(opened.architecture, bundle, base)
        corrector = Corrector(trained, bundle, opened, clamp, device)
        trial = None
        if data is not None:  # everything is checked before the first weight is read
            target = open_base_target(base, opened.source.revision or revision, dtype, trust_remote_code)
            stack.enter_context(target.tensors)
            batches = load_batches(
                data,
                target.source,
                samples=samples,
                max_length=max_length,
                batch_size=batch_size,
                seed=seed,
                trust_remote_code=trust_remote_code,
            )
            trial = _Trial(trained, pairs, target, data, batches, max_length, seed)
        tensors: dict[str, torch.Tensor] = {}
        records: dict[str, CorrectedLayer] = {}
        for number, (module, keys) in enumerate(trained.loras.items(), 1):
            corrected = corrector.correct(module)
            if corrected is not None:
                tensors |= {keys.A: corrected.A, keys.B: corrected.B}
                records[module] = corrected.record
            progress(Step("correct", number, len(trained.loras), module))
        heldout = None if trial is None else trial.run(tensors, select=select, device=device, progress=progress)
        chosen = heldout.winner if heldout is not None else None
        if chosen is not None and chosen.adapter == "trained":
            tensors, records = {}, {}
        unchanged = [key for key in trained.tensors.names() if key not in tensors]
        if chosen == NONE:
            output = None
        if output is not None:
            tensors |= {key: trained.read(key) for key in unchanged}
            if chosen is not None:
                tensors |= corrector.scaled(tensors, chosen.scale)
            folder = stack.enter_context(new_folder(output, overwrite=overwrite))
            config = _config(trained.config, base, opened.source.revision, type(opened.model))
            fields = {
                "made_by": made_by(command, opened.library),
                "base": BaseRecord(id=base, revision=opened.source.revision, architecture=opened.architecture),
                "emulator": bundle.hash,
                "trained_adapter": trained.hash,
                "clamp": clamp,
                "layers": records,
                "unchanged": unchanged,
            }
            if isinstance(trained, DiffusersLora):
                write_diffusers_lora(folder, trained, config, tensors, fields=fields)
            else:
                selection = heldout.selection if heldout is not None else None
                write_adapter(folder, config, tensors, fields=fields, selection=selection)
    head = trained_head(opened.model, trained.tensors.names())
    return CorrectionResult(output, records, unchanged, heldout, head, trained.component)


class _Trial:
    """The base with held-out samples, on which the trained and the corrected adapter are to be compared.

    `pairs` are the trained ones. Raises `MismatchError` for pairs of other shapes, `InputError` for too few samples.
    """

    def __init__(
        self,
        trained: Adapter,
        pairs: Mapping[str, LoraPair],
        target: Target,
        data: Path,
        batches: Sequence[Batch],
        max_length: int | None,
        seed: int,
    ) -> None:
        self._trained, self._pairs, self._target, self._batches = trained, pairs, target, batches
        require_shapes(target, trained.folder, pairs)
        counts = target_counts(batches)
        samples = int((counts > 0).sum())
        if samples < LEAST_SAMPLES:
            raise InputError(
                f"{data} gives {samples} sample with a token to predict; a comparison needs at least {LEAST_SAMPLES}, "
                "and some hundreds to tell small differences"
            )
        self._data = DataRecord(
            file=data.name,
            hash=file_hash(data),
            samples=samples,
            tokens=int(counts.sum()),
            max_length=max_length,
            seed=seed,
        )

    def run(self, corrected: Mapping[str, torch.Tensor], *, select: bool, device: str, progress: Progress) -> HeldOut:
        """Measure all candidates in one go; `corrected` are the corrected tensors by their stored names."""
        fitted = {
            module: LoraPair(corrected[keys.A], corrected[keys.B], keys.scaling)
            for module, keys in self._trained.loras.items()
            if keys.A in corrected
        }
        pairs = {"trained": self._pairs, "corrected": {**self._pairs, **fitted}}
        tried = candidates(SCALES if select else (1.0,))
        scores = score(
            self._target.name,
            self._target.model,
            self._target.weights,
            self._batches,
            [scaled(pairs[each.adapter], each.scale) for each in tried if each != NONE],
            device=device,
            guard=blaming_inputs,
            progress=lambda done, total: progress(Step("evaluate", done, total, self._target.name)),
        )
        measured = table(tried, [found.losses for found in scores], scores[0].tokens)
        predicts: Literal["tokens", "labels"] = "labels" if self._target.classifies else "tokens"
        return HeldOut(self._data, measured, choose(measured) if select else None, predicts)


def _config(trained: Mapping[str, Any], base: str, revision: str | None, base_class: type) -> dict[str, Any]:
    """The trained adapter's configuration, pointing at the base; unknown fields pass through."""
    config = {**trained, "base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    if config.get("auto_mapping"):
        # Without a task type, PEFT finds the model class by this; it named the emulator's own code.
        config["auto_mapping"] = {
            "base_model_class": base_class.__name__,
            "parent_library": base_class.__module__,
        }
    config["init_lora_weights"] = True  # pairs are complete; other inits would only compute what they replace
    return config
