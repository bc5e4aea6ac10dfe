"""evaluate: loss and accuracy of a base, an emulator, and either with adapters, on tokens or labels; streamed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emloc_tools.data.batches import load_batches
from emloc_tools.errors import InputError
from emloc_tools.files.adapter import CONFIG as ADAPTER
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_ADAPTER
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.ready_inputs import TARGET
from emloc_tools.models.base import choose_device
from emloc_tools.models.lora import LoraPair
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.candidates import Target, load_pairs, open_base_target, open_emulator_target, require_shapes
from emloc_tools.stages.passes import blaming_inputs
from emloc_tools.stages.refusals import require_artifact, require_original, require_plain_lora
from emloc_tools.stages.scoring import Scores, score, target_counts


@dataclass(frozen=True)
class Evaluation:
    """One model with at most one adapter: mean loss in nats per target token, and the part predicted rightly.

    `predicts` says what counts: target tokens, or for a sequence classifier the labels of whole samples; then `tokens`
    is the number of labels. Of ready inputs with a target it is the entries of the model's output, the loss is the mean
    squared error, and `accuracy` and `exact` are None. `exact` is the part of samples whose target tokens are all
    predicted rightly, each given the right ones before it: for prompts, how often greedy decoding gives the completion.
    `corrected` says whether the adapter is one that `correct` wrote.
    """

    model: str
    adapter: str | None
    corrected: bool
    loss: float
    accuracy: float | None
    exact: float | None
    tokens: int
    predicts: Literal["tokens", "labels", "entries"] = "tokens"

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None for labels and entries."""
        return math.exp(min(self.loss, 700.0)) if self.predicts == "tokens" else None


def evaluate(
    *,
    data: Path,
    base: str | None = None,
    emulator: Path | None = None,
    adapters: Sequence[Path] = (),
    revision: str | None = None,
    samples: int | None = None,
    max_length: int | None = 2048,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> list[Evaluation]:
    """Evaluate `base`, `emulator`, or both, each without an adapter and with every one of `adapters`.

    Targets are all tokens of a `text` or a chat, the completion of a `prompt`, the label of a text, or what
    `record-inputs` kept as the target of a denoiser's call. A corrected adapter belongs to the base and is not run on
    the emulator. `trust_remote_code` is for the base's code alone; an emulator's is never run. All variants of a model
    share its passes, one for every `scoring.TOKENS_IN_FLIGHT` tokens, counted once for each variant; peak memory is
    that of one unit and the activations. Raises `UnsupportedError` for models that predict neither the next token nor a
    label and are no denoisers.
    """
    if base is None and emulator is None:
        raise InputError("give --base, --emulator or both")
    device = choose_device(device)
    loaded = {path: _load(path) for path in adapters}
    if base is None:
        for path, (_, corrected) in loaded.items():
            if corrected:
                raise InputError(f"{path} is corrected, so it belongs to the base and not to its emulator; give --base")
    opened = []
    if base is not None:
        require_original(base)
        opened.append(open_base_target(base, revision, dtype, trust_remote_code, denoisers=True))
    if emulator is not None:
        require_artifact(emulator, EMULATOR, "an emulator")
        opened.append(open_emulator_target(emulator, dtype))
    jobs = []
    for target in opened:  # everything is checked before the first weight is read
        usable = {path: pairs for path, (pairs, corrected) in loaded.items() if not (corrected and target.is_emulator)}
        for path, pairs in usable.items():
            require_shapes(target, path, pairs)
        batches = load_batches(
            data,
            target.source,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            trust_remote_code=trust_remote_code and not target.is_emulator,
            config=target.config,
        )
        target_counts(batches)
        jobs.append((target, usable, batches))
    results = []
    for number, (target, usable, batches) in enumerate(jobs):
        with target.tensors:
            scores = score(
                target.name,
                target.model,
                target.weights,
                batches,
                list(usable.values()),
                device=device,
                guard=blaming_inputs,
                progress=_part(progress, number, len(jobs), target.name),
            )
        variants = [(None, False), *((str(path), loaded[path][1]) for path in usable)]
        for (adapter, corrected), found in zip(variants, scores, strict=True):
            results.append(_evaluation(target, adapter, corrected, found, entries=TARGET in batches[0].inputs))
    return results


def _evaluation(target: Target, adapter: str | None, corrected: bool, scores: Scores, *, entries: bool) -> Evaluation:
    return Evaluation(
        target.name,
        adapter,
        corrected,
        loss=scores.loss,
        accuracy=None if entries else scores.accuracy,
        exact=None if entries else scores.exact,
        tokens=int(scores.tokens.sum()),
        predicts="entries" if entries else "labels" if target.classifies else "tokens",
    )


def _part(progress: Progress, number: int, models: int, name: str) -> Callable[[int, int], None]:
    """Progress of one of several models."""
    return lambda done, total: progress(Step("evaluate", number * total + done, total * models, name))


def _load(path: Path) -> tuple[dict[str, LoraPair], bool]:
    """The pairs of an adapter, of PEFT or of diffusers, and whether `correct` wrote it."""
    if not (path / DIFFUSERS_ADAPTER).is_file():
        require_artifact(path, ADAPTER, "a PEFT adapter")
    with contextlib.closing(open_adapter(path)) as adapter:
        require_plain_lora(adapter)
        return load_pairs(adapter), adapter.corrected
