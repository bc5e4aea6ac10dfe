"""One call of a unit: what the forward leaves behind of it, such that the backward can run it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from emloc_tools.errors import UnsupportedError
from emloc_tools.streaming.graph import Slot
from emloc_tools.streaming.repeat import agree, differentiable, sketch
from emloc_tools.streaming.spill import Spill, Stored
from emloc_tools.streaming.units import Unit


@dataclass(eq=False)
class Result:
    """A tensor that a call computed: the gradient that arrives for it, and what it looked like."""

    slot: Slot
    sketch: torch.Tensor


@dataclass(eq=False)
class Argument:
    """A tensor that a call read. `sink` if it requires a gradient, `after` if the unit changed it in place."""

    stored: Stored
    sink: Slot | None
    after: Result | None = None


@dataclass(eq=False)
class Call:
    """One call of a unit, or of a module inside it.

    `leaves` are the arguments as `spec` flattens them, with an `Argument` for every tensor. `results` has an entry for
    every leaf of what was returned: None unless it is a new floating-point tensor. `firsts` are the sinks of the
    tensors that no earlier call used: their keys on the tape, scalars and slots.
    """

    batch: int
    visit: Visit
    run: Callable[..., Any]
    spec: TreeSpec
    leaves: list[Any] = field(default_factory=list)
    results: list[Result | None] = field(default_factory=list)
    firsts: list[tuple[Any, torch.Tensor, Slot]] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        """Whether a gradient arrived for anything that the call computed."""
        return any(result.slot.gradient is not None for result in (*self.results, *self._changed()) if result)

    def arguments(self) -> list[Argument]:
        """The tensor arguments, each once."""
        return list({id(leaf): leaf for leaf in self.leaves if isinstance(leaf, Argument)}.values())

    def replay(self, spill: Spill) -> None:
        """Run the call again, with gradients, and pass those of its results on to the sinks of its arguments.

        The unit's weights are loaded. Raises `UnsupportedError` if the results are not those of the forward.
        """
        arguments = self.arguments()
        leaves = {id(each): spill.load(each.stored).requires_grad_(each.sink is not None) for each in arguments}
        with torch.enable_grad():
            # A leaf of the graph must not be changed in place.
            passed = {key: leaves[key].clone() if each.after else leaves[key] for key, each in _by_id(arguments)}
            args, kwargs = tree_unflatten([passed.get(id(leaf), leaf) for leaf in self.leaves], self.spec)
            returned, _ = tree_flatten(self.run(*args, **kwargs))
            changed = [passed[key] for key, each in _by_id(arguments) if each.after]
            starts = self._starts([*returned, *changed])
            if starts:
                torch.autograd.backward([tensor for tensor, _ in starts], [gradient for _, gradient in starts])
        for key, each in _by_id(arguments):
            gradient = leaves[key].grad
            if each.sink is not None and gradient is not None:
                each.sink.add(gradient)

    def _starts(self, computed: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the replay computed, if it is what the forward did, and the gradients that have arrived for it."""
        results = [*self.results, *self._changed()]
        if len(computed) != len(results):
            raise self._differs()
        starts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor, result in zip(computed, results, strict=True):
            if result is None:
                continue
            comparable = isinstance(tensor, torch.Tensor) and differentiable(tensor)
            if not comparable or not agree(result.sketch, sketch(tensor), tensor.dtype):
                raise self._differs()
            gradient = result.slot.take()
            if gradient is not None and tensor.requires_grad:
                starts.append((tensor, gradient))
        return starts

    def _changed(self) -> list[Result]:
        return [each.after for each in self.arguments() if each.after is not None]

    def _differs(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self.visit.unit.name} gave another result when it was run a second time on the same input, so its "
            "gradient cannot be computed; such units use random numbers, or keep a cache or a counter between calls"
        )


class Visit:
    """The calls of a unit during one time that it is loaded.

    `load` counts the unit's loads; `mark` is the size of the spill before the first call.
    """

    def __init__(self, unit: Unit, load: int, mark: int) -> None:
        self.unit, self.load, self.mark = unit, load, mark
        self.calls: list[Call] = []


def _by_id(arguments: Sequence[Argument]) -> list[tuple[int, Argument]]:
    return [(id(argument), argument) for argument in arguments]
