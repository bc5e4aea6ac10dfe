"""Adam on the LoRA pairs of a model that streams by: one step takes many samples, and reads every weight twice at most.

Why so few steps suffice. An emulator leads a LoRA most of the way, in many small steps that cost little. What is left
is what the emulator cannot show, and for that the base itself must be asked. A gradient over many samples is exact
enough for large steps, and on a model that streams by, samples cost computing but no reading.

The step size is relative. An Adam step moves every entry of a tensor by about its learning rate, and what is a small
move depends on the entries: those of B start at zero in training, so their size says how far the training has gone.
The learning rates of all A and of all B are `step_size` times the root mean square of their entries. They rise and fall
as half a sine over the steps: the first step of Adam has no second moment to go by and moves every entry equally, large
gradient or small, which at full length does harm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import InputError, NumericalError
from emloc_tools.models.layers import describe
from emloc_tools.models.lora import LoraPair, attach_loras, match_module
from emloc_tools.models.weights import ModelWeights
from emloc_tools.streaming.backward import BackwardLockStep
from emloc_tools.streaming.units import Unit

EPSILON = 1e-15  # next to nothing, so that steps stay relative: gradients of large models are tiny
BETAS = (0.9, 0.95)  # of few steps, each with little noise: the second moment must not remember the first for long


@dataclass(frozen=True)
class Objective:
    """What one step minimises: the sum of `loss(index, result)`, a scalar, over the results of `calls`, by `count`.

    The sum runs backward, and the gradients are divided afterwards, in float32: those of a mean over many tokens would
    vanish in half precision on their way through the model.
    """

    calls: Sequence[Callable[[], Any]]
    loss: Callable[[int, Any], torch.Tensor]
    count: int


def refine_pairs(
    model: nn.Module,
    weights: ModelWeights,
    pairs: Mapping[str, LoraPair],
    steps: Sequence[Objective],
    *,
    step_size: float,
    spill: Path,
    device: str,
    progress: Callable[[int, int, str], None],
) -> tuple[dict[str, LoraPair], list[float]]:
    """The pairs after one Adam step for each of `steps`, in float32 on the CPU; and what each step found to minimise.

    `model` (parameters on meta) streams with `weights`; activations pass through a file in the folder `spill`.
    `progress(done, total, what)` counts units. Raises `InputError` for pairs whose B are all zero, which nobody
    trained, `NumericalError` for a loss or a gradient that is not finite.
    """
    trained = {
        name: LoraPair(_leaf(pair.A, device), _leaf(pair.B, device), pair.scaling) for name, pair in pairs.items()
    }
    optimizer = _optimizer(trained, step_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(steps)))
    # Before the streaming begins, whose second runs of a unit keep only hooks that were there first.
    handles = attach_loras(model, [trained], lambda: 0)
    modules = dict(model.named_modules())
    names = [match_module(name, [known for known in modules if hasattr(modules[known], "weight")]) for name in pairs]
    layers = [describe(name, modules[name]) for name in names if name is not None]
    stream = BackwardLockStep(model, weights, layers, spill=spill, device=device)
    losses: list[float] = []
    try:
        for number, objective in enumerate(steps):
            optimizer.zero_grad()
            _watch(stream, number, len(steps), progress)
            losses.append(_gradients(stream, objective) / objective.count)
            _finish_gradients(trained, objective.count)
            optimizer.step()
            schedule.step()
    finally:
        stream.close()
        for handle in handles:
            handle.remove()
    return {
        name: LoraPair(pair.A.detach().cpu(), pair.B.detach().cpu(), pair.scaling) for name, pair in trained.items()
    }, losses


def rate(step: int, steps: int) -> float:
    """The part of the step size that step 0, 1, … of `steps` has: half a sine. One step alone has all of it."""
    return math.sin(math.pi * (step + 0.5) / steps)


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
    return torch.optim.Adam(groups, betas=BETAS, eps=EPSILON)


def _gradients(stream: BackwardLockStep, objective: Objective) -> float:
    """Add the gradients of the objective's sum to the pairs; returns the sum."""
    parts = torch.zeros(len(objective.calls), dtype=torch.float64)

    def keep(index: int, value: torch.Tensor) -> None:
        parts[index] = value.double()

    stream.run_backward(objective.calls, objective.loss, keep)
    if not torch.isfinite(parts).all():
        raise NumericalError("the loss of the base with the LoRA is not finite; try --dtype float32")
    return float(parts.sum())


def _watch(stream: BackwardLockStep, step: int, steps: int, progress: Callable[[int, int, str], None]) -> None:
    units = len(stream.units)

    def report(unit: Unit, *, seen: set[tuple[Unit, bool]], backward: bool) -> None:
        seen.add((unit, backward))  # a unit that is used several times is done several times
        progress(2 * units * step + len(seen), 2 * units * steps, f"step {step + 1} of {steps}")

    seen: set[tuple[Unit, bool]] = set()
    stream.on_unit_done = functools.partial(report, seen=seen, backward=False)
    stream.on_backward_unit_done = functools.partial(report, seen=seen, backward=True)


def _finish_gradients(pairs: Mapping[str, LoraPair], count: int) -> None:
    """Divide the gradients by `count`. Raises `NumericalError` for one that is not finite."""
    for name, pair in pairs.items():
        for tensor in (pair.A, pair.B):
            if tensor.grad is None:
                continue
            if not torch.isfinite(tensor.grad).all():
                raise NumericalError(f"the gradient of the LoRA of {name} is not finite; try --dtype float32")
            tensor.grad /= count
