"""Autograd's graph of a model with gaps in place of its units: where gradients leave it, and where they come in again.

    ... ─▶ Sink │ a unit, without graph │ Source ─▶ what the model does between units ─▶ Sink │ a unit │ Source ─▶ ...

A whole graph would hold every unit's weights and activations. Here a unit's result enters the graph through `Source`,
and its arguments leave it through `Sink`. Neither node holds a tensor, only a `Slot` for a gradient. In the backward a
Source puts there what arrives for the unit's result; the unit is run again with a graph of its own; the gradient of
its argument is put into the Sink's slot, and the Sink sends it further up.

An argument is also cut from its past when a unit first uses it, and its Sink alone goes on from there. Otherwise every
gradient would run up along all residual connections that lie between units at once, and every further one again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from emloc_tools.errors import UnsupportedError
from emloc_tools.streaming.repeat import version
from emloc_tools.streaming.spill import Spill, Stored


class Slot:
    """The sum of the gradients that arrived for one tensor."""

    def __init__(self) -> None:
        self.gradient: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient. Not in place: autograd may have given the same tensor to others."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def take(self) -> torch.Tensor | None:
        """The sum, which is then forgotten."""
        gradient, self.gradient = self.gradient, None
        return gradient


class Source(torch.autograd.Function):
    """A unit's result as the graph sees it: the same memory, with gradients that end in a slot.

    `anchor` requires a gradient, so that the result does; `box` hides the tensor from autograd, which would keep it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, box: list[torch.Tensor], slot: Slot) -> torch.Tensor:
        """Take the tensor out of the box."""
        ctx.slot = slot
        tensor = box.pop()
        # Not a view: autograd forbids to change a view that comes from a custom function in place.
        return tensor.data if tensor._is_view() or tensor.requires_grad else tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        """Keep the gradient."""
        ctx.slot.add(gradient)
        return None, None, None


class Sink(torch.autograd.Function):
    """A tensor that goes into units, as a scalar: its backward sends the slot's gradient up the tensor's graph."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, zero: torch.Tensor, slot: Slot) -> torch.Tensor:
        """Make the scalar. All share the memory of `zero`: so many small allocations would fragment the heap."""
        ctx.slot = slot
        return zero.detach()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        """Give the gradient away."""
        return ctx.slot.take(), None, None


def cut(tensor: torch.Tensor, anchor: torch.Tensor, slot: Slot) -> None:
    """Make a tensor a source in place: what it is used for from now on sends its gradient to `slot`.

    Its version stays what it was. A view keeps the connection to its base's past, which is correct but takes longer.
    """
    if not tensor._is_view():
        # Else autograd would go on through the tensor's past, with undefined gradients.
        tensor.detach_()
    with _unsafe_preserve_version_counter(tensor):
        Cut.apply(anchor, tensor, slot)  # type: ignore[no-untyped-call]


class Cut(torch.autograd.Function):
    """See `cut`."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
        """Replace the tensor's past."""
        ctx.slot = slot
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        """Keep the gradient."""
        ctx.slot.add(gradient)
        return None, None, None


class Saved:
    """A tensor that a node between two units needs in its backward: in memory while its batch runs, then on disk."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor.detach()  # detached, or the graph would hold itself
        self._version = version(tensor)
        self._stored: Stored | None = None

    def move(self, spill: Spill) -> None:
        """Move it to disk."""
        if self._tensor is not None:
            self._stored = spill.save(self._unchanged(self._tensor))
            self._tensor = None

    def load(self, spill: Spill) -> torch.Tensor:
        """The tensor, wherever it is."""
        if self._tensor is not None:
            return self._unchanged(self._tensor)
        assert self._stored is not None  # one of the two is always there
        return spill.load(self._stored)

    def _unchanged(self, tensor: torch.Tensor) -> torch.Tensor:
        if version(tensor) != self._version:
            raise UnsupportedError(
                f"the model changes in place a tensor of shape {list(tensor.shape)} that its own gradient needs, so "
                "gradients of this model cannot be computed at all"
            )
        return tensor
