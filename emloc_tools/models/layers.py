"""Which linear layers of a model are replaced by low-rank factors."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from emloc_tools.errors import InputError
from emloc_tools.models.experts import stacks_of
from emloc_tools.models.linears import is_linear
from emloc_tools.records import Layer

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def select_layers(model: nn.Module, *, targets: str | None = None, exclude: str | None = None) -> list[Layer]:
    """The linear layers to treat, in the model's order; fused experts as one stack per projection.

    By default those inside repeated blocks, without routers: embeddings and heads stay dense. `targets` replaces that
    choice by every linear layer and stack whose name matches the regular expression (searched anywhere in the name),
    `exclude` takes away. A layer that shares its weight with another module is never chosen by default. Raises
    `InputError` for a pattern that matches nothing or is not a regular expression.
    """
    layers = all_layers(model)
    if targets is None:
        tied = tied_parameters(model)
        chosen = [
            name
            for name in layers
            if in_block(model, name)
            and ROUTERS.isdisjoint(name.split("."))
            and id(_weight(model, layers[name])) not in tied
        ]
        if not chosen:
            raise InputError(f"{type(model).__name__} has no linear layer inside repeated blocks; choose by --targets")
    else:
        chosen = _matching(list(layers), targets, "--targets")
    if exclude is not None:
        excluded = set(_matching(chosen, exclude, "--exclude"))
        chosen = [name for name in chosen if name not in excluded]
        if not chosen:
            raise InputError(f"--exclude {exclude!r} leaves no layer")
    return [layers[name] for name in chosen]


def describe(name: str, module: nn.Module) -> Layer:
    """Shape and orientation of a Linear or Conv1D."""
    assert isinstance(module.weight, torch.Tensor)  # both kinds have one
    rows, columns = module.weight.shape
    if isinstance(module, Conv1D):
        return Layer(name, columns, rows, "conv1d", module.bias is not None)
    return Layer(name, rows, columns, "linear", module.bias is not None)


def all_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer and stack of experts by name."""
    found = []
    for name, module in model.named_modules():
        found += [describe(name, module)] if is_linear(module) else stacks_of(name, module)
    return {layer.name: layer for layer in found}


def _weight(model: nn.Module, layer: Layer) -> nn.Parameter:
    return model.get_parameter(layer.name if layer.experts else f"{layer.name}.weight")


def in_block(model: nn.Module, name: str) -> bool:
    """Whether an element of a ModuleList holds the module, at any depth but as its own element."""
    parts = name.split(".")
    lists = (".".join(parts[:depth]) for depth in range(1, len(parts) - 1))
    return any(isinstance(model.get_submodule(path), nn.ModuleList) for path in lists)


def tied_parameters(model: nn.Module) -> set[int]:
    """The identities of the parameters that several modules have."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def _matching(names: list[str], pattern: str, option: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{option} {pattern!r} is not a regular expression: {error}") from error
    matching = [name for name in names if compiled.search(name)]
    if not matching:
        examples = ", ".join(names[:3])
        raise InputError(f"{option} {pattern!r} matches no linear layer; there are {len(names)}, such as {examples}")
    return matching
