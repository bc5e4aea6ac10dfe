"""What of a model stays as it is when its layers become factors, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from emloc_tools.models.layers import ROUTERS, all_layers, in_block, tied_parameters
from emloc_tools.records import Layer

BIAS = "bias of a factored layer"
SHARED = "its weight is another module's, too"
ROUTER = "router"
HEAD = "output head"
OUTSIDE = "outside repeated blocks"
SMALL = "factors would not be smaller"
EXPERTS = "experts in a layout of their own"
OTHER = "no linear layer"
UNUSUAL = "not called, or more than a linear layer"  # such as the output of torch's attention
# By parts of class names. What a model calls a norm or an embedding is one, whatever it computes.
KINDS = {"Router": ROUTER, "Embedding": "embedding", "Norm": "norm", "Conv": "convolution"}


@dataclass(frozen=True)
class DensePart:
    """Alike parts of a model that stay dense: `count` modules with `parameters` values in all.

    `name` is a module's, or a parameter's where a module holds several things; a star stands for the numbers of blocks.
    A tensor that several parts share counts for the first.
    """

    name: str
    count: int
    parameters: int
    reason: str


def dense_parts(model: nn.Module, factored: Collection[str], omitted: str) -> list[DensePart]:
    """Every parameter of a model that is not the weight of a layer or stack in `factored`, by parts, in its order.

    `omitted` is the reason for layers that could have become factors and are not among these.
    """
    reasons = _Reasons(model, factored, omitted)
    members: dict[tuple[str, str], set[str]] = {}
    sizes: dict[tuple[str, str], int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            reason = reasons.of(name, module, key)
            if reason is not None:
                shown = f"{name}.{key}".lstrip(".") if reason in (OTHER, EXPERTS) else name
                part = _starred(shown), reason
                members.setdefault(part, set()).add(shown)
                sizes[part] = sizes.get(part, 0) + (0 if id(parameter) in seen else parameter.numel())
            seen.add(id(parameter))
    return [DensePart(part[0], len(members[part]), size, part[1]) for part, size in sizes.items()]


class _Reasons:
    """Says why a parameter stays dense."""

    def __init__(self, model: nn.Module, factored: Collection[str], omitted: str) -> None:
        self._model, self._factored, self._omitted = model, set(factored), omitted
        self._layers = all_layers(model)
        self._tied = tied_parameters(model)
        self._head = getattr(model, "get_output_embeddings", lambda: None)()

    def of(self, name: str, module: nn.Module, key: str) -> str | None:
        """The reason for the parameter `key` of a module; None if it becomes factors."""
        full = f"{name}.{key}"
        layer = self._layers.get(full) or self._layers.get(name)
        if full in self._factored or (name in self._factored and key == "weight"):
            return None
        if name in self._factored or full.removesuffix("_bias") in self._factored:
            return BIAS
        if layer is not None:
            return self._of_layer(layer, module, key)
        if not ROUTERS.isdisjoint(name.split(".")):
            return ROUTER
        if isinstance(module, nn.Linear):
            return UNUSUAL
        kind = next((reason for part, reason in KINDS.items() if part in type(module).__name__), None)
        if kind is not None:
            return kind
        return EXPERTS if module._parameters[key].dim() == 3 and "expert" in full.lower() else OTHER  # type: ignore[union-attr]

    def _of_layer(self, layer: Layer, module: nn.Module, key: str) -> str:
        if not ROUTERS.isdisjoint(layer.name.split(".")):
            return ROUTER
        if id(module._parameters.get("weight")) in self._tied:
            return SHARED
        if module is self._head:
            return HEAD
        if not in_block(self._model, layer.name):
            return OUTSIDE
        return SMALL if layer.parameters <= layer.rank_cost else self._omitted


def _starred(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
