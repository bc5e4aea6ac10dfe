"""evaluate: loss, perplexity and token accuracy of a base, an emulator, and either with adapters; streamed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from emloc_tools.errors import InputError, NumericalError
from emloc_tools.files.adapter import CONFIG as ADAPTER
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.models.base import choose_device
from emloc_tools.models.data import Batch, load_batches
from emloc_tools.models.lora import LoraPair, attach_loras
from emloc_tools.models.stream import LockStep
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.candidates import Target, load_pairs, open_base_target, open_emulator_target, require_shapes
from emloc_tools.stages.refusals import blaming_inputs, require_artifact, require_original, require_plain_lora

ROWS_PER_SOFTMAX = 512  # bounds the float32 copy of the logits: 512 x 128256 x 4 bytes = 263 MB
TOKENS_IN_FLIGHT = 65536  # activations of so many tokens are held while the model streams by once


@dataclass(frozen=True)
class Evaluation:
    """One model with at most one adapter: mean loss in nats per target token, and the part predicted rightly.

    `exact` is the part of samples whose target tokens are all predicted rightly, each given the right ones before it:
    for prompts, how often greedy decoding gives the completion. `corrected` says whether the adapter is one that `correct` wrote.
    """

    model: str
    adapter: str | None
    corrected: bool
    loss: float
    accuracy: float
    exact: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


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

    Targets are all tokens of a `text` or a chat, and the completion of a `prompt`. A corrected adapter belongs to the
    base and is not run on the emulator. All variants of a model share one pass over its weights; peak memory is that of
    one unit and the activations. Raises `UnsupportedError` for models that do not predict the next token.
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
        opened.append(open_base_target(base, revision, dtype, trust_remote_code))
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
            trust_remote_code=trust_remote_code,
        )
        jobs.append((target, usable, batches))
    results = []
    for number, (target, usable, batches) in enumerate(jobs):
        with target.tensors:
            first, *others = _run(target, batches, list(usable.values()), device, number, len(jobs), progress)
        results.append(first.result(target.name, None, False))
        for path, total in zip(usable, others, strict=True):
            results.append(total.result(target.name, str(path), loaded[path][1]))
    return results


def _load(path: Path) -> tuple[dict[str, LoraPair], bool]:
    """The pairs of an adapter, and whether `correct` wrote it."""
    require_artifact(path, ADAPTER, "a PEFT adapter")
    with contextlib.closing(Adapter(path)) as adapter:
        require_plain_lora(adapter)
        return load_pairs(adapter), adapter.corrected


@dataclass
class _Sum:
    """Running sums over target tokens."""

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0
    exact: int = 0
    samples: int = 0

    def result(self, model: str, adapter: str | None, corrected: bool) -> Evaluation:
        if not self.tokens:
            raise InputError("the data hold no token to predict; samples need at least two tokens")
        if not math.isfinite(self.loss):
            raise NumericalError(f"{model}: the loss is not finite; try --dtype float32")
        return Evaluation(
            model,
            adapter,
            corrected,
            loss=self.loss / self.tokens,
            accuracy=self.correct / self.tokens,
            exact=self.exact / self.samples,
            tokens=self.tokens,
        )


def _run(
    target: Target,
    batches: Sequence[Batch],
    adapters: Sequence[Mapping[str, LoraPair]],
    device: str,
    number: int,
    models: int,
    progress: Progress,
) -> list[_Sum]:
    """Sums without adapter and with each one. The model streams by once per wave of batches."""
    variants = range(-1, len(adapters))
    stream = LockStep(target.model, target.weights, device=device)
    waves = list(_waves([(batch, variant) for batch in batches for variant in variants]))
    sums = [_Sum() for _ in variants]
    done = 0

    def report(unit: object) -> None:
        nonlocal done
        done += 1
        total = len(stream.units) * len(waves)
        # A unit that the model uses several times is done several times.
        progress(Step("evaluate", number * total + min(done, total), total * models, target.name))

    stream.on_unit_done = report
    for wave in waves:
        handles = attach_loras(target.model, adapters, lambda wave=wave: _adapter(wave[stream.current][1]))  # type: ignore[misc]

        def add(index: int, logits: torch.Tensor, wave: Sequence[tuple[Batch, int]] = wave) -> None:
            batch, variant = wave[index]
            _add(sums[variant + 1], batch, logits)

        stream.run([_forward(target.model, batch, stream.device) for batch, _ in wave], add)
        for handle in handles:
            handle.remove()
    stream.close()
    return sums


def _adapter(variant: int) -> int | None:
    return None if variant < 0 else variant


def _waves(work: Sequence[tuple[Batch, int]]) -> list[list[tuple[Batch, int]]]:
    waves: list[list[tuple[Batch, int]]] = [[]]
    tokens = 0
    for batch, variant in work:
        size = next(iter(batch.inputs.values())).numel()
        if waves[-1] and tokens + size > TOKENS_IN_FLIGHT:
            waves.append([])
            tokens = 0
        waves[-1].append((batch, variant))
        tokens += size
    return waves


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> Callable[[], torch.Tensor]:
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items() if name != "labels"}

    def call() -> torch.Tensor:
        with blaming_inputs(model, inputs):
            return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]

    return call


def _add(total: _Sum, batch: Batch, logits: torch.Tensor) -> None:
    """Add the losses of a batch's target tokens, given `logits (batch, length, vocabulary)` of the token after each."""
    ids, targets = _targets(batch)
    wanted = targets[:, 1:].to(logits.device)
    rows, labels = logits[:, :-1][wanted], ids[:, 1:].to(logits.device)[wanted]
    hits = torch.empty(len(labels), dtype=torch.bool, device=labels.device)
    for start in range(0, len(labels), ROWS_PER_SOFTMAX):
        part = slice(start, start + ROWS_PER_SOFTMAX)
        total.loss += float(F.cross_entropy(rows[part].float(), labels[part], reduction="sum"))
        hits[part] = rows[part].argmax(-1) == labels[part]
    right = torch.zeros_like(wanted)
    right[wanted] = hits
    asked = wanted.any(1)
    total.correct += int(hits.sum())
    total.tokens += len(labels)
    total.exact += int(((right == wanted).all(1) & asked).sum())
    total.samples += int(asked.sum())


def _targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which of them are targets, both `(batch, length)`."""
    labels, ids = batch.inputs.get("labels"), batch.inputs.get("input_ids")
    if labels is not None:
        return labels, labels != -100
    if ids is None:
        raise InputError("the ready inputs hold neither input_ids nor labels, so there is nothing to predict")
    if batch.targets is not None:
        return ids, batch.targets
    return ids, batch.mask if batch.mask is not None else torch.ones_like(ids, dtype=torch.bool)
