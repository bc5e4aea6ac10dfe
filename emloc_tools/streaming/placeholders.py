"""What stands in a module for a weight that is not loaded: it can be looked at, and is loaded when it is computed with.

A plain tensor on meta is not enough: torch multiplies it with a real one (`linear`, `matmul`, `conv1d`) without a word,
and the result is whatever was in memory. A model that uses a weight without calling the module that owns it (DeBERTa's
table of relative positions) would be computed wrongly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from emloc_tools.errors import UnsupportedError
from emloc_tools.streaming.units import Slot, put, value

# Functions that look at a tensor and not into it, beside the getters of attributes.
DESCRIBING = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset", "get_device"),
        *("is_floating_point", "is_complex", "is_contiguous", "requires_grad_", "__len__", "__repr__", "__hash__"),
    }
)


class NotLoaded(torch.Tensor):
    """A tensor on meta that refuses every operation with a tensor that is not on meta; so do its views."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ != "__get__" and func.__name__ not in DESCRIBING:
            args, kwargs = loaded((args, kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(isinstance(tensor, NotLoaded) for tensor in tensors):
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            if not all(tensor.is_meta for tensor in tensors):
                shape = next(list(tensor.shape) for tensor in tensors if isinstance(tensor, NotLoaded))
                raise UnsupportedError(
                    f"the model computes with a weight of shape {shape} that is not loaded, since it does not call the "
                    "module that owns the weight; such models cannot be streamed"
                )
            result = func(*args, **(kwargs or {}))
            return tree_map_only(torch.Tensor, lambda tensor: tensor.as_subclass(NotLoaded), result)


class Placeholder(NotLoaded, nn.Parameter):
    """A parameter that is not loaded. `get()` is the loaded one, or None where nothing runs that could need it."""

    destination = torch.device("meta")
    get: Callable[[], torch.Tensor | None]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the parameter will be: some models move their inputs to where they find their first parameter."""
        return self.destination


def loaded(values: Any) -> Any:
    """Nested values with the weights in place of their placeholders, as far as these can be had."""

    def weight(placeholder: Placeholder) -> torch.Tensor:
        found = placeholder.get()
        return placeholder if found is None else found

    return tree_map_only(Placeholder, weight, values)


class Placeholders:
    """Puts placeholders in all parameter slots that are on meta, tied ones the same, until it is removed.

    They name `device` as their own; it is where the weights will be loaded. `get(slot)` loads one that the model
    computes with although it has not called the module that owns it; by default such weights cannot be had.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        device: torch.device = Placeholder.destination,
        get: Callable[[Slot], torch.Tensor | None] = lambda slot: None,
    ) -> None:
        self._before: list[tuple[Slot, torch.Tensor]] = []
        made: dict[int, torch.Tensor] = {}
        for slot in slots:
            before = value(slot)
            if not isinstance(before, nn.Parameter) or isinstance(before, Placeholder) or not before.is_meta:
                continue
            if id(before) not in made:
                made[id(before)] = torch.Tensor._make_subclass(Placeholder, before.detach(), before.requires_grad)
                made[id(before)].__dict__.update(before.__dict__, destination=device, get=functools.partial(get, slot))
            self._before.append((slot, before))
            put(slot, made[id(before)])

    def remove(self) -> None:
        """Put the plain parameters back."""
        for slot, before in self._before:
            put(slot, before)
        self._before.clear()
