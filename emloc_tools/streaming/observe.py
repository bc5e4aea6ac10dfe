"""See what the linear layers of a unit read and write, one batch at a time, and which of them read the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from emloc_tools.models.experts import module_of
from emloc_tools.records import Layer, Side
from emloc_tools.streaming.observed_experts import Watch, observe_experts, stop_observing
from emloc_tools.streaming.padding import real_rows, real_slots


@dataclass
class Reading:
    """A tensor that one or more layers read in one call, its rows without padding, and what the layers wrote.

    `inputs (rows, in)` is None where no layer wants it; `outputs[layer] (rows, out)` holds those that are wanted.
    """

    source: torch.Tensor
    version: int | None
    inputs: torch.Tensor | None = None
    layers: list[str] = field(default_factory=list)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether x is the very tensor read: the same memory in the same shape, and unchanged since."""
        same = x is self.source or (
            x.numel() > 0  # empty tensors have one address in common
            and x.data_ptr() == self.source.data_ptr()
            and x.shape[-1] == self.source.shape[-1]
            and x.numel() == self.source.numel()
            and x.dtype == self.source.dtype
            and x.is_contiguous()
            and self.source.is_contiguous()
        )
        return same and self.version is not None and _version(x) == self.version


class Observer:
    """Records, per batch, what the given layers read and write, until `take` fetches it.

    Of `stacks` of experts it is what each expert reads, and writes before the bias, under the names of the members.
    `current()` names the running batch; `mask(batch, layer, x)` gives the `(batch, length)` mask of real tokens in x,
    which the layer reads, or None; `wanted(layer)` says which sides of the layer are needed.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        *,
        current: Callable[[], int],
        mask: Callable[[int, str, torch.Tensor], torch.Tensor | None],
        wanted: Callable[[str], frozenset[Side]],
        stacks: Iterable[Layer] = (),
    ) -> None:
        self._current, self._mask, self._wanted = current, mask, wanted
        self._readings: dict[int, list[Reading]] = {}
        self._handles: list[Any] = []
        for name in layers:
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        self._experts: dict[nn.Module, dict[str, str]] = {}  # of each module, its projections and their stacks
        for stack in stacks:
            projection = stack.name.rpartition(".")[2]
            self._experts.setdefault(module_of(model, stack), {})[projection] = stack.name
        if self._experts:
            observe_experts(model, {module: self._watch(names) for module, names in self._experts.items()})

    def take(self, batch: int) -> list[Reading]:
        """What the batch's layers read since the last call."""
        return self._readings.pop(batch, [])

    def batches(self) -> list[int]:
        """Batches with readings that were not taken."""
        return list(self._readings)

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        stop_observing(self._experts)

    def _hook(self, name: str) -> Callable[..., None]:
        @torch.no_grad()  # in a backward run, too: rows must not hold the graph that they were computed by
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            batch, wanted = self._current(), self._wanted(name)
            mask = self._mask(batch, name, x)
            reading = self._reading(batch, name, x)
            reading.layers.append(name)
            if "input" in wanted and reading.inputs is None:
                reading.inputs = real_rows(x, mask)
            if "output" in wanted:
                reading.outputs[name] = real_rows(output, mask)

        return see

    def _watch(self, stacks: dict[str, str]) -> Watch:
        @torch.no_grad()
        def see(member: str, x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor, of: int) -> None:
            projection, _, number = member.partition(".")
            if projection not in stacks:
                return
            name = f"{stacks[projection]}.{number}"
            batch, wanted = self._current(), self._wanted(name)
            mask = self._mask(batch, name, x)
            inputs = real_slots(x, mask, tokens, of) if "input" in wanted else None
            outputs = {name: real_slots(y, mask, tokens, of)} if "output" in wanted else {}
            # Every expert has rows of its own, so nothing is shared.
            self._readings.setdefault(batch, []).append(Reading(x, None, inputs, [name], outputs))

        return see

    def _reading(self, batch: int, name: str, x: torch.Tensor) -> Reading:
        readings = self._readings.setdefault(batch, [])
        for reading in reversed(readings):
            if reading.is_of(x) and name not in reading.layers:
                return reading
        readings.append(Reading(x, _version(x)))
        return readings[-1]


def _version(x: torch.Tensor) -> int | None:
    """How often the tensor was changed in place. Tensors of inference mode do not tell, so they are never shared."""
    return None if x.is_inference() else x._version
