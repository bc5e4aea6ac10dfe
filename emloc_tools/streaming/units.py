"""The units of a model: what a streamed forward loads and frees together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from emloc_tools.models.weights import ModelWeights
from emloc_tools.streaming.memory import Arena

Slot = tuple[nn.Module, str, bool, str]  # owner, attribute, whether it is a buffer, full name


class Unit:
    """A module whose weights are loaded and freed together. `rank` is its place in the order of registration."""

    def __init__(self, name: str, module: nn.Module, rank: int, slots: list[Slot]) -> None:
        self.name, self.module, self.rank, self.slots = name, module, rank, slots
        self.loaded = False
        self.inside = 0  # batches between entering and leaving
        self.placeholders: list[torch.Tensor] = []
        self.arena: Arena | None = None

    def __repr__(self) -> str:
        return f"Unit({self.name})"


def partition(model: nn.Module, weights: ModelWeights, max_unit_bytes: int) -> tuple[list[Unit], list[Slot]]:
    """Cut a model into units; what directly belongs to a container (a stray position embedding) stays resident.

    A unit is an element of a ModuleList or Sequential, or a module with parameters of its own, up to the size limit.
    One above the limit is cut into its children, and those again, down to modules without children.
    """
    units: list[Unit] = []
    resident: list[Slot] = []
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module, part: bool) -> None:
        slots = [] if module in seen else _slots(name, module, weights, recurse=True)
        if not slots:
            return
        own = _slots(name, module, weights, recurse=False)
        leaf = not any(True for child in module.children() for _ in child.parameters())
        holds_blocks = any(isinstance(child, nn.ModuleList) for child in module.modules())
        callable_ = _has_forward(module) and module is not model
        candidate = callable_ and (part or (bool(own) and not holds_blocks))
        if (callable_ and leaf) or (candidate and _nbytes(slots) <= max_unit_bytes):
            units.append(Unit(name, module, len(units), slots))
            seen.update(module.modules())
            return
        resident.extend(own)
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            visit(path, child, candidate or isinstance(module, (nn.ModuleList, nn.Sequential)))

    visit("", model, False)
    return units, resident


def _slots(name: str, module: nn.Module, weights: ModelWeights, *, recurse: bool) -> list[Slot]:
    members = module.named_modules(remove_duplicate=False) if recurse else iter([("", module)])
    found: list[Slot] = []
    for path, member in members:
        prefix = ".".join(part for part in (name, path) if part)
        for is_buffer, tensors in ((False, member._parameters), (True, member._buffers)):
            for attribute, tensor in tensors.items():
                full = f"{prefix}.{attribute}" if prefix else attribute
                if tensor is not None and full in weights.source_of:
                    found.append((member, attribute, is_buffer, full))
    return found


def value(slot: Slot) -> torch.Tensor:
    """The tensor that is in a slot now."""
    owner, attribute, is_buffer, _ = slot
    tensor = (owner._buffers if is_buffer else owner._parameters)[attribute]
    assert tensor is not None  # slots are made of tensors that exist
    return tensor


def put(slot: Slot, tensor: torch.Tensor) -> None:
    """Put a tensor in a slot, as a parameter if the slot is one."""
    owner, attribute, is_buffer, _ = slot
    if is_buffer:
        owner._buffers[attribute] = tensor
    else:
        is_parameter = isinstance(tensor, nn.Parameter)
        parameter = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)
        owner._parameters[attribute] = cast(nn.Parameter, parameter)


def _nbytes(slots: Sequence[Slot]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in map(value, slots)}.values())


def _has_forward(module: nn.Module) -> bool:
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList)
    return not isinstance(module, containers) and type(module).forward is not nn.Module.forward
