"""Accumulates the second moments of the loss gradient while batches stream backward, and the losses they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from emloc_tools.data.batches import Batch
from emloc_tools.errors import InputError, NumericalError, UnsupportedError
from emloc_tools.files.calibration import GramSpool
from emloc_tools.files.ready_inputs import TARGET
from emloc_tools.linalg.cross_entropy import IGNORED, summed_cross_entropy
from emloc_tools.linalg.gram import accumulate
from emloc_tools.models.labels import classifies_sequences
from emloc_tools.models.skeleton import matches_pairs, predicts_next_token
from emloc_tools.records import GradientGram, Loss, Progress, Step
from emloc_tools.streaming.backward import BackwardLockStep
from emloc_tools.streaming.gradients import Gradient
from emloc_tools.streaming.padding import Padding, real_rows, real_slots
from emloc_tools.streaming.units import Unit


class GradientSums:
    """Sums what `stream` reports of the gradients of real tokens; a finished unit's sums move to the spool."""

    def __init__(self, stream: BackwardLockStep, padding: Padding, spool: GramSpool, progress: Progress) -> None:
        self._stream, self._padding, self._spool, self._progress = stream, padding, spool, progress
        self._grams: dict[str, GradientGram] = {}
        self._done = 0
        stream.on_gradient = self._add
        stream.on_backward_unit_done = self._unit_done

    def finish(self) -> None:
        """Move what is left to the spool."""
        for layer, gram in self._grams.items():
            if not (torch.isfinite(gram.matrix.diagonal()).all() and math.isfinite(gram.energy)):
                raise NumericalError(f"the gradients of layer {layer} hold NaN or infinity; try --dtype float32")
            self._spool.add((layer,), gram)
        self._grams.clear()

    def _add(self, batch: int, gradient: Gradient) -> None:
        mask = self._padding.mask(batch, gradient.layer)
        if gradient.tokens is None:
            rows, squares = real_rows(gradient.rows, mask), real_rows(gradient.squares[..., None], mask)
        else:
            rows, squares = (
                real_slots(part, mask, gradient.tokens, gradient.of)
                for part in (gradient.rows, gradient.squares[..., None])
            )
        gram = self._grams.get(gradient.layer)
        if gram is None:
            G = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
            gram = GradientGram(G, gradient.side, 0, 0.0)
        accumulate(gram.matrix, rows)
        energy = gram.energy + float(squares.double().sum())
        self._grams[gradient.layer] = GradientGram(gram.matrix, gram.side, gram.tokens + len(rows), energy)

    def _unit_done(self, unit: Unit) -> None:
        self.finish()
        self._done += 1
        units = len(self._stream.units)
        self._progress(Step("gradients", min(self._done, units), units, unit.name))


def loss_of(batches: Sequence[Batch], architecture: str, config: Any = None) -> Loss:
    """Which loss the batches have. Raises `InputError` or `UnsupportedError` where there is none."""
    if all(batch.labels is not None for batch in batches):
        return "model"
    targets = [batch.targets for batch in batches if batch.targets is not None]
    if len(targets) == len(batches):
        if classifies_sequences(architecture):
            raise InputError(f"gradients need a loss: {architecture} classifies texts, so every record needs a `label`")
        if not predicts_next_token(architecture, config):
            raise UnsupportedError(
                f"{architecture} does not predict the next token, so texts give no loss; for gradients give ready "
                "model inputs (.safetensors) with labels"
            )
        if not any(target[:, 1:].any() for target in targets):  # nothing predicts the first token
            raise InputError(
                "gradients need a loss: no sample holds a token to predict; are completions beyond --max-length?"
            )
        return "next-token"
    if all(TARGET in batch.inputs for batch in batches):
        return "squared-error"
    if matches_pairs(architecture):
        if any(_pairs(batch) < 2 for batch in batches):
            raise InputError(
                f"gradients need a loss: {architecture} compares every pair of a batch with the others, so each n of "
                "the ready model inputs needs two images and two texts at least"
            )
        return "model"
    if not all("labels" in batch.inputs for batch in batches):
        raise InputError(
            "gradients need a loss: the ready model inputs hold neither labels (<n>/labels) nor what the output is to "
            f"be (<n>/{TARGET}) in every batch"
        )
    return "model"


def batch_loss(batch: Batch, output: Any, model: nn.Module) -> torch.Tensor:
    """The loss of a batch: cross-entropy in nats summed over target tokens, or what the model itself returns.

    For texts with labels it is summed over the samples, so that it does not depend on the batches. For ready inputs
    with a target it is the squared error of the model's first output, summed over all entries, in float32.
    """
    if batch.labels is not None:
        return summed_cross_entropy(output.logits, batch.labels.to(output.logits.device))
    if TARGET in batch.inputs:
        return _squared_error(output[0], batch.inputs[TARGET], model)
    if batch.targets is None:
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise UnsupportedError(f"{type(model).__name__} returns no loss for the ready inputs")
        if not torch.isfinite(loss):
            raise NumericalError(
                f"{type(model).__name__} returns the loss {float(loss.detach()):g} for ready inputs; labels that are "
                "all -100 give none, and a narrow --dtype can overflow"
            )
        return loss.reshape(())
    labels = torch.full_like(batch.targets, IGNORED, dtype=torch.int64)
    labels[:, :-1] = batch.inputs["input_ids"][:, 1:].masked_fill(~batch.targets[:, 1:], IGNORED)
    return summed_cross_entropy(output.logits, labels.to(output.logits.device))


def _pairs(batch: Batch) -> int:
    """How many rows each input of a batch has, at least."""
    return min((tensor.shape[0] for tensor in batch.inputs.values() if tensor.dim() > 1), default=0)


def _squared_error(found: Any, target: torch.Tensor, model: nn.Module) -> torch.Tensor:
    if not isinstance(found, torch.Tensor) or found.shape != target.shape:
        shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise InputError(
            f"{type(model).__name__} gives {shape} and the {TARGET} of the ready inputs is {list(target.shape)}; they "
            "are compared entry by entry"
        )
    loss = (found.float() - target.to(found.device).float()).square().sum()
    if not torch.isfinite(loss):
        raise NumericalError(f"the squared error of {type(model).__name__} is not finite; try --dtype float32")
    return loss
