"""Losses per sample of a streamed model with several adapters, in as few passes over its weights as memory allows.

What is predicted are the target tokens of a sample, or, by a sequence classifier, its one label; or every entry of what
ready inputs name as the model's `target`, whose loss is the squared error.

Every batch runs once without and once with each adapter; the runs go through the model in lock-step. They are cut into
waves of `TOKENS_IN_FLIGHT`, and the model is read once for each wave, so that memory is bounded whatever the data are:
`N` tokens and `k` adapters take about `N · (k + 1) / TOKENS_IN_FLIGHT` passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from emloc_tools.data.batches import Batch
from emloc_tools.data.ready_inputs import arguments_of
from emloc_tools.errors import InputError, NumericalError
from emloc_tools.files.ready_inputs import TARGET
from emloc_tools.linalg.cross_entropy import IGNORED, ROWS_PER_SOFTMAX
from emloc_tools.models.lora import LoraPair, attach_loras
from emloc_tools.models.weights import ModelWeights
from emloc_tools.streaming.stream import LockStep

# Activations of so many tokens are held while the model streams by once: a hidden state of each, 0.5 GB for a hidden
# size of 4096 in bfloat16, and what the model's own code keeps between blocks. A larger batch has a pass of its own.
TOKENS_IN_FLIGHT = 65536

Guard = Callable[[nn.Module, Iterable[str]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Scores:
    """What a model made of each sample's target tokens, all `(samples,)`. A label counts as a token, and so an entry.

    `losses` are sums in nats, or of squares, float64; `right` counts the tokens that were predicted rightly, out of
    `tokens`, int64; of entries none are.
    Samples without a target stay in, with zeros. `passes` says how many times the model was read, for all adapters.
    """

    losses: torch.Tensor
    right: torch.Tensor
    tokens: torch.Tensor
    passes: int

    @property
    def loss(self) -> float:
        """Mean loss per target token."""
        return float(self.losses.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """The part of target tokens that were predicted rightly."""
        return float(self.right.sum() / self.tokens.sum())

    @property
    def exact(self) -> float:
        """The part of samples, of those with targets, whose every target was predicted rightly."""
        asked = self.tokens > 0
        return float((self.right == self.tokens)[asked].double().mean())


def target_counts(batches: Sequence[Batch]) -> torch.Tensor:
    """Target tokens of every sample, `(samples,)`, int64; 1 for a label. Raises `InputError` where there is none."""
    if len({TARGET in batch.inputs for batch in batches}) > 1:
        raise InputError(f"some of the ready inputs hold a {TARGET} and some none; one loss cannot be taken of both")
    counts = torch.cat([_counts(batch) for batch in batches])
    if not counts.any():
        raise InputError(
            "the data hold no token to predict; samples need at least two tokens, or for a sequence classifier a label"
        )
    return counts


def score(
    name: str,
    model: nn.Module,
    weights: ModelWeights,
    batches: Sequence[Batch],
    adapters: Sequence[Mapping[str, LoraPair]],
    *,
    device: str,
    guard: Guard,
    progress: Callable[[int, int], None],
) -> list[Scores]:
    """The scores without adapter, and then with each one; `progress(done, total)` counts units over all passes.

    Adapters that share their tensors cost no memory of their own. `guard` turns complaints about the inputs into
    messages. Raises `InputError` for data without targets, `NumericalError` for a loss that is not finite.
    """
    counts = target_counts(batches)
    starts = torch.tensor([0] + [len(_counts(batch)) for batch in batches]).cumsum(0).tolist()
    losses = torch.zeros(len(adapters) + 1, len(counts), dtype=torch.float64)
    right = torch.zeros(len(adapters) + 1, len(counts), dtype=torch.int64)
    waves = list(waves_of(batches, range(-1, len(adapters))))
    stream = LockStep(model, weights, device=device)
    done = 0

    def report(unit: object) -> None:
        nonlocal done
        done += 1
        total = len(stream.units) * len(waves)
        progress(min(done, total), total)  # a unit that the model uses several times is done several times

    stream.on_unit_done = report
    for wave in waves:

        def active(wave: Sequence[tuple[int, int]] = wave) -> int | None:
            adapter = wave[stream.current][1]
            return None if adapter < 0 else adapter

        def add(index: int, logits: torch.Tensor, wave: Sequence[tuple[int, int]] = wave) -> None:
            number, adapter = wave[index]
            loss, hits = _score(batches[number], logits)
            rows = slice(starts[number], starts[number] + len(loss))
            losses[adapter + 1, rows], right[adapter + 1, rows] = loss, hits

        handles = attach_loras(model, adapters, active)
        stream.run([forward_of(model, batches[number], stream.device, guard) for number, _ in wave], add)
        for handle in handles:
            handle.remove()
    stream.close()
    if not torch.isfinite(losses).all():
        raise NumericalError(f"{name}: the loss is not finite; try --dtype float32")
    return [Scores(loss, hits, counts, len(waves)) for loss, hits in zip(losses, right, strict=True)]


def waves_of(batches: Sequence[Batch], adapters: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every batch with every adapter, by their numbers, in groups that run together."""
    waves: list[list[tuple[int, int]]] = [[]]
    tokens = 0
    for number, batch in enumerate(batches):
        size = _positions(next(iter(batch.inputs.values())))
        for adapter in adapters:
            if waves[-1] and tokens + size > TOKENS_IN_FLIGHT:
                waves.append([])
                tokens = 0
            waves[-1].append((number, adapter))
            tokens += size
    return waves


def forward_of(model: nn.Module, batch: Batch, device: torch.device, guard: Guard) -> Callable[[], torch.Tensor]:
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items() if name not in ("labels", TARGET)}
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def call() -> torch.Tensor:
        with guard(model, inputs):
            output = model(**arguments_of(inputs), **options)
            return output[0] if TARGET in batch.inputs else output.logits  # type: ignore[no-any-return]

    return call


def _score(batch: Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (float64) and right predictions (int64) of each sample's targets, both `(batch,)`, on the CPU.

    `logits (batch, length, vocabulary)` are those of the token after each, or `(batch, labels)` those of the labels; or
    they are an output that has the shape of the batch's target.
    """
    if TARGET in batch.inputs:
        return _score_entries(batch.inputs[TARGET], logits)
    if (known := _labels(batch)) is not None:
        return _score_labels(known, logits)
    if logits.dim() != 3:
        raise InputError("this model predicts no tokens; ready inputs for it need labels, one for each sample")
    ids, targets = _targets(batch)
    wanted = targets[:, 1:].to(logits.device)
    rows, labels = logits[:, :-1][wanted], ids[:, 1:].to(logits.device)[wanted]
    losses = torch.empty(len(labels), dtype=torch.float32)
    hits = torch.empty(len(labels), dtype=torch.int64)
    for start in range(0, len(labels), ROWS_PER_SOFTMAX):
        part = slice(start, start + ROWS_PER_SOFTMAX)
        losses[part] = F.cross_entropy(rows[part].float(), labels[part], reduction="none").cpu()
        hits[part] = (rows[part].argmax(-1) == labels[part]).cpu().long()
    sample = wanted.nonzero()[:, 0].cpu()
    summed = torch.zeros(len(wanted), dtype=torch.float64).index_add_(0, sample, losses.double())
    return summed, torch.zeros(len(wanted), dtype=torch.int64).index_add_(0, sample, hits)


def _score_labels(labels: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of one label per sample; -100 is none."""
    rows = logits.detach().float().cpu()
    fits = rows.dim() == 2 and len(rows) == len(labels) and rows.shape[1] > 1 and not labels.is_floating_point()
    if not fits or int(labels.max()) >= rows.shape[1]:
        raise InputError(
            f"the labels {labels.tolist()[:8]} do not fit the model's output of shape {list(logits.shape)}; expected "
            "one whole number for each sample of a model that gives two labels or more, one for each token of others"
        )
    losses = F.cross_entropy(rows, labels.long(), reduction="none").double()
    return losses, (rows.argmax(-1) == labels).long()


def _score_entries(target: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the entries of an output: squared errors, and nothing that is right."""
    if not isinstance(output, torch.Tensor) or output.shape != target.shape:
        shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise InputError(f"the model gives {shape} and the {TARGET} of the ready inputs is {list(target.shape)}")
    errors = (output.detach().float().cpu() - target.float()).square().double()
    return errors.flatten(1).sum(1), torch.zeros(len(errors), dtype=torch.int64)


def _positions(tensor: torch.Tensor) -> int:
    """Tokens in a model's first input: ids, hidden states `(batch, length, size)`, or a picture with its channels."""
    if tensor.is_floating_point() and tensor.dim() > 2:
        return tensor.numel() // (tensor.shape[2] if tensor.dim() == 3 else tensor.shape[1])
    return tensor.numel()


def _counts(batch: Batch) -> torch.Tensor:
    """What is predicted of each sample, `(batch,)` int64."""
    if (target := batch.inputs.get(TARGET)) is not None:
        return torch.full((len(target),), target[0].numel(), dtype=torch.int64)
    labels = _labels(batch)
    return _targets(batch)[1][:, 1:].sum(1) if labels is None else (labels != IGNORED).long()


def _labels(batch: Batch) -> torch.Tensor | None:
    """The labels `(batch,)` of whole samples, where the batch has such."""
    ready = batch.inputs.get("labels")
    return ready if batch.labels is None and ready is not None and ready.dim() == 1 else batch.labels


def _targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which of them are targets, both `(batch, length)`."""
    labels, ids = batch.inputs.get("labels"), batch.inputs.get("input_ids")
    if labels is not None:
        return labels, labels != IGNORED
    if ids is None:
        given = ", ".join(batch.inputs)
        raise InputError(
            f"the ready inputs {given} hold neither input_ids nor labels nor a {TARGET}, so there is nothing to "
            f"predict; add <n>/labels or <n>/{TARGET}"
        )
    if batch.targets is not None:
        return ids, batch.targets
    return ids, batch.mask if batch.mask is not None else torch.ones_like(ids, dtype=torch.bool)
