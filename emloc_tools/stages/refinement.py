"""Adam on the LoRA pairs of a model that streams by: one step takes many samples, and reads every weight twice at most.

Why so few steps suffice. An emulator leads a LoRA most of the way, in many small steps that cost little. What is left
is what the emulator cannot show, and for that the base itself must be asked. A gradient over many samples is exact
enough for large steps, and on a model that streams by, samples cost computing but no reading.

The step size is relative. An Adam step moves every entry of a tensor by about its learning rate, and what is a small
move depends on the entries: those of B start at zero in training, so their size says how far the training has gone.
The learning rates of all A and of all B are `step_size` times the root mean square of their entries, and fall to zero
with the cosine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_tools.data.batches import Batch
from emloc_tools.errors import InputError, NumericalError
from emloc_tools.files.ready_inputs import TARGET
from emloc_tools.linalg.cross_entropy import IGNORED
from emloc_tools.models.layers import describe
from emloc_tools.models.lora import LoraPair, attach_loras, match_module
from emloc_tools.models.weights import ModelWeights
from emloc_tools.stages.gradient_sums import batch_loss
from emloc_tools.stages.passes import call_of, sparing_options
from emloc_tools.streaming.backward import BackwardLockStep
from emloc_tools.streaming.units import Unit

BETAS = (0.9, 0.95)  # of few steps, each with little noise: the second moment must not remember the first for long


def refine_pairs(
    model: nn.Module,
    weights: ModelWeights,
    pairs: Mapping[str, LoraPair],
    steps: Sequence[Sequence[Batch]],
    *,
    step_size: float,
    spill: Path,
    device: str,
    progress: Callable[[int, int, str], None],
) -> tuple[dict[str, LoraPair], list[float]]:
    """The pairs after one Adam step for each of `steps`, in float32 on the CPU; and each step's loss before it.

    `model` (parameters on meta) streams with `weights`; activations pass through a file in the folder `spill`. The loss
    is that of `calibrate --gradients`, as a mean over the step's target tokens, labels or entries. `progress(done,
    total, what)` counts units. Raises `InputError` for pairs whose B are all zero, which nobody trained,
    `NumericalError` for a loss or a gradient that is not finite.
    """
    trained = {
        name: LoraPair(_leaf(pair.A, device), _leaf(pair.B, device), pair.scaling) for name, pair in pairs.items()
    }
    optimizer = _optimizer(trained, step_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / len(steps)))
    )
    # Before the streaming begins, whose second runs of a unit keep only hooks that were there first.
    handles = attach_loras(model, [trained], lambda: 0)
    modules = dict(model.named_modules())
    names = [match_module(name, [known for known in modules if hasattr(modules[known], "weight")]) for name in pairs]
    layers = [describe(name, modules[name]) for name in names if name is not None]
    stream = BackwardLockStep(model, weights, layers, spill=spill, device=device)
    losses: list[float] = []
    try:
        for number, batches in enumerate(steps):
            optimizer.zero_grad()
            _watch(stream, number, len(steps), progress)
            losses.append(_gradients(stream, model, batches, device))
            _require_finite(trained)
            optimizer.step()
            schedule.step()
    finally:
        stream.close()
        for handle in handles:
            handle.remove()
    return {
        name: LoraPair(pair.A.detach().cpu(), pair.B.detach().cpu(), pair.scaling) for name, pair in trained.items()
    }, losses


def _leaf(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.detach().to(device, torch.float32, copy=True).requires_grad_()


def _optimizer(pairs: Mapping[str, LoraPair], step_size: float) -> torch.optim.Adam:
    groups = []
    for tensors in ([pair.A for pair in pairs.values()], [pair.B for pair in pairs.values()]):
        squares = sum(float(tensor.detach().square().sum()) for tensor in tensors)
        size = math.sqrt(squares / sum(tensor.numel() for tensor in tensors))
        groups.append({"params": tensors, "lr": step_size * size})
    if not groups[1]["lr"]:
        raise InputError("every B of the LoRA is zero, so it was not trained; a step has no size to go by")
    return torch.optim.Adam(groups, betas=BETAS)


def _gradients(stream: BackwardLockStep, model: nn.Module, batches: Sequence[Batch], device: str) -> float:
    """Add the gradients of the mean loss of `batches` to the pairs; returns the loss."""
    counted = sum(_counted(batch) for batch in batches)
    options = sparing_options(model, (), batches, loss=True)
    calls = [call_of(model, batch, torch.device(device), options) for batch in batches]
    losses = torch.zeros(len(batches), dtype=torch.float64)

    def loss(index: int, result: Any) -> torch.Tensor:
        return batch_loss(batches[index], result, model) / counted

    def keep(index: int, value: torch.Tensor) -> None:
        losses[index] = value.double()

    stream.run_backward(calls, loss, keep)
    if not torch.isfinite(losses).all():
        raise NumericalError("the loss of the base with the LoRA is not finite; try --dtype float32")
    return float(losses.sum())


def _counted(batch: Batch) -> int:
    """Over how many the loss of a batch is summed; 1 where the model gives a mean itself."""
    if batch.labels is not None:
        return int((batch.labels != IGNORED).sum())
    if batch.targets is not None:
        return int(batch.targets[:, 1:].sum())
    return batch.inputs[TARGET].numel() if TARGET in batch.inputs else 1


def _watch(stream: BackwardLockStep, step: int, steps: int, progress: Callable[[int, int, str], None]) -> None:
    units = len(stream.units)

    def report(unit: Unit, *, seen: set[tuple[Unit, bool]], backward: bool) -> None:
        seen.add((unit, backward))  # a unit that is used several times is done several times
        progress(2 * units * step + len(seen), 2 * units * steps, f"step {step + 1} of {steps}")

    seen: set[tuple[Unit, bool]] = set()
    stream.on_unit_done = functools.partial(report, seen=seen, backward=False)
    stream.on_backward_unit_done = functools.partial(report, seen=seen, backward=True)


def _require_finite(pairs: Mapping[str, LoraPair]) -> None:
    for name, pair in pairs.items():
        for tensor in (pair.A, pair.B):
            if tensor.grad is not None and not torch.isfinite(tensor.grad).all():
                raise NumericalError(f"the gradient of the LoRA of {name} is not finite; try --dtype float32")
