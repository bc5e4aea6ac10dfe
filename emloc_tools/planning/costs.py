"""About how much disk and main memory each of our stages takes, from shapes alone.

These are estimates: sums of what a stage holds at its peak, in terms of the largest unit, layer and tensor of a model.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emloc_tools.linalg.gram import smaller_side
from emloc_tools.planning.ledger import Memory
from emloc_tools.planning.step import inference_memory
from emloc_tools.records import Layer

PROCESS = 400_000_000  # bytes of Python with torch, transformers and PEFT imported, on Linux
ADAM_COPIES = 4  # of a LoRA: its pairs, their gradients and two moments
UNIT = 4 << 30  # bytes; a larger block is read in parts
LOGITS_COPIES = 3  # in float32: the logits, their normalised form, and the gradient
TIMES_WEIGHT = 3  # float64 matrices of a weight's shape that a decomposition holds at once: W, its scaled copy, M
TIMES_SQUARE = 10  # float64 matrices of the smaller side: the Grams, their products, eigenvectors and LAPACK's work


@dataclass(frozen=True)
class StageNeeds:
    """Bytes on disk that a stage leaves, bytes that it takes there for a while besides, and its peak main memory."""

    stage: str
    disk: int
    scratch: int
    memory: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of a base in all, of its largest unit and of its largest tensor."""

    whole: int
    unit: int
    tensor: int
    units: int


def sizes_of(model: nn.Module) -> Sizes:
    """Of a model as it is stored. A unit is an element of a list of blocks, or a module with parameters outside."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    units: list[int] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            nbytes = sum(parameter.nbytes for parameter in child.parameters())
            block = isinstance(module, (nn.ModuleList, nn.Sequential))
            if nbytes and ((block and nbytes <= UNIT) or not any(True for _ in child.children())):
                units.append(nbytes)
            else:
                visit(child)

    visit(model)
    tensors = [parameter.nbytes for parameter in parameters.values()]
    return Sizes(sum(tensors), max(units), max(tensors), len(units))


def inference_and_groups(
    model: nn.Module, layers: Sequence[Layer], inputs: Mapping[str, Any]
) -> tuple[Memory, list[list[Layer]]]:
    """The peak of a forward pass without gradients, and the layers in groups that read the same tensor in it.

    Layers that the inputs do not reach are in no group, nor are stacks of experts.
    """
    groups: list[list[Layer]] = []
    last: list[tuple[weakref.ref[torch.Tensor], list[Layer]]] = []
    seen: set[str] = set()

    def note(layer: Layer, x: torch.Tensor) -> None:
        if layer.name in seen:
            return
        seen.add(layer.name)
        group = next((group for reference, group in last if reference() is x), None)
        if group is None:
            group = []
            groups.append(group)
            last[:] = [*last[-3:], (weakref.ref(x), group)]
        group.append(layer)

    for layer in layers:
        if layer.experts is None:

            def hook(module: nn.Module, args: tuple[Any, ...], layer: Layer = layer) -> None:
                note(layer, args[0])

            model.get_submodule(layer.name).register_forward_pre_hook(hook)
    return inference_memory(model, inputs), groups


def grams_of(groups: Sequence[Sequence[Layer]], stacks: Sequence[Layer], *, gradients: bool) -> list[int]:
    """The sizes n of the n x n Grams that a calibration holds."""
    found: list[int] = []
    for group in groups:
        shared = smaller_side(list(group)) == "input"
        found += [group[0].in_features] if shared else [layer.out_features for layer in group]
        found += [min(layer.out_features, layer.in_features) for layer in group] if gradients else []
    for stack in stacks:
        found += [min(stack.out_features, stack.in_features)] * (stack.experts or 1) * (2 if gradients else 1)
    return found


def stage_needs(
    sizes: Sizes,
    layers: Sequence[Layer],
    groups: Sequence[Sequence[Layer]],
    *,
    tokens: int,
    samples: int,
    hidden: int,
    vocabulary: int,
    itemsize: int,
    emulator: int,
    adapter: int,
) -> list[StageNeeds]:
    """What the stages need for a base of `sizes` of which `layers` become factors.

    `tokens` are those of a batch, `samples` the batches of a calibration, `hidden` the width of what passes between
    blocks, `itemsize` the bytes of a number of the base; `emulator` and `adapter` are bytes of what is written.
    """
    stacks = [layer for layer in layers if layer.experts is not None]
    grams = grams_of(groups, stacks, gradients=True)
    stored = sum(n * (n + 1) // 2 * 4 for n in grams)
    per_block = math.ceil(sum(n * n * 4 for n in grams) / max(sizes.units, 1))
    passing = tokens * samples * hidden * itemsize
    logits = tokens * vocabulary * (itemsize + 4 * LOGITS_COPIES)
    streamed = PROCESS + sizes.unit + 2 * passing
    return [
        StageNeeds("calibrate --gradients", stored, passing * (sizes.units + 2), streamed + per_block + logits),
        StageNeeds("build-emulator", emulator, 0, PROCESS + max(sizes.tensor, _decomposing(layers, itemsize))),
        StageNeeds("correct", adapter, 0, PROCESS + max(_correcting(layer, itemsize) for layer in layers)),
        StageNeeds("refine", adapter, passing * (sizes.units + 2), streamed + ADAM_COPIES * adapter + logits),
        StageNeeds("merge", sizes.whole, 0, PROCESS + 3 * sizes.tensor),
        StageNeeds("evaluate", 0, 0, streamed + logits),
    ]


def _decomposing(layers: Sequence[Layer], itemsize: int) -> int:
    """The largest layer with what its decomposition makes in float64."""

    def one(layer: Layer) -> int:
        entries, smaller = layer.out_features * layer.in_features, min(layer.out_features, layer.in_features)
        return layer.parameters * itemsize + 8 * (TIMES_WEIGHT * entries + TIMES_SQUARE * smaller**2)

    return max(map(one, layers))


def _correcting(layer: Layer, itemsize: int) -> int:
    """A layer's weight as it is stored, and in float32 beside its emulator's factors."""
    return layer.parameters * itemsize + 2 * 4 * layer.out_features * layer.in_features
