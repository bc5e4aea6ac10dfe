"""Lock-step backward: the gradients of many batches at chosen layers of a model that is larger than memory.

The forward is that of `stream.LockStep`; then the units are loaded once more, in reverse order, and each is run again
with a graph of its own to pass the gradients on. So every weight is read at most twice, and memory holds one unit, its
activations for one batch, and one gradient per batch.

How it works. The model's own code runs with gradients enabled, but every call of a unit runs without, and is recorded
on its batch's `Tape`: where its arguments lie on disk, and slots for the gradients of its results. What the model does
between units is recorded by autograd as always. As soon as a batch's forward ends, its loss is differentiated: the
gradients run up to the outputs of the last units and stop there, in slots. Now the calls are reversed, last first:

    load the unit; read the arguments from disk; run it with gradients; backward from the slots of its results;
    put the gradients of its arguments into their sinks; differentiate each sink once, when the first call that used
    the tensor has been reversed, for then its gradient is complete. This fills the slots of earlier units.

All batches pass a unit while it is loaded, in the forward and in the backward. A unit that is still loaded when a
batch's forward ends (the head) is reversed at once, so that logits never accumulate.

Why the tricks:

- Graph nodes hold no tensors (see `graph`), and what autograd saves between units goes to disk when its batch parks.
  Otherwise memory would grow with depth.
- The modules' `forward` is wrapped, instead of hooked: the unit's own hooks then see its tensors as part of the graph,
  once, in the forward. Hooks inside a unit run again with it if they were there when this object was made, since they
  may belong to the model; those that were added later only watch and do not see the recomputation.
- Whether gradients are enabled is a property of the thread, not of the greenlet: `Task.park` keeps it per batch.
- Nothing parks inside of a backward: greenlets cannot switch within autograd's C++ engine. This is why the gradients
  stop in slots instead of running through the units by themselves.
- Between the freed activations lie small objects of tapes and graphs, so that the C heap would grow with depth:
  the gaps are given back after every unit.

Refused, because the result would be wrong: units that change the state of an argument (caches), units whose second run
gives other results (random numbers, counters), changing a tensor in place that shares memory with another one. Not
seen: what a unit passes on by other ways than its result, such as attributes of modules, or the attentions and router
logits that transformers collects by hooks inside of blocks. No gradient runs there; hidden states are fine.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from emloc_tools.errors import InputError
from emloc_tools.models.experts import module_of
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import Layer
from emloc_tools.streaming.calls import Call, Visit
from emloc_tools.streaming.forwards import OtherForward, hook_ids, without_hooks
from emloc_tools.streaming.gradients import Gradient, tapped
from emloc_tools.streaming.graph import Saved
from emloc_tools.streaming.memory import give_heap_back
from emloc_tools.streaming.observed_experts import tapped_experts
from emloc_tools.streaming.placeholders import loaded
from emloc_tools.streaming.repeat import carries_gradient
from emloc_tools.streaming.spill import Spill
from emloc_tools.streaming.stream import MAX_UNIT_BYTES, LockStep, Task
from emloc_tools.streaming.tape import Tape
from emloc_tools.streaming.units import Unit


class BackwardLockStep(LockStep):
    """Runs batches forward and backward through `model` (parameters on meta, evaluation mode).

    `on_gradient(task_index, gradient)` is called for every call of each of `layers` that a loss depends on, while the
    layer's weights are loaded; its tensors may be changed afterwards. No parameter needs a gradient.
    `on_backward_unit_done(unit)` is called for every unit that was used when no more gradients of its layers will come,
    after its weights are freed. The callbacks of `LockStep` belong to the forward.

    Activations go to one unlinked file in the folder `spill`: about tokens · hidden size · bytes · (units + 2), and
    what autograd saves between units. `spilled` counts the bytes written in the last run.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: ModelWeights,
        layers: Sequence[Layer],
        *,
        spill: Path,
        device: str | torch.device = "cpu",
        max_unit_bytes: int = MAX_UNIT_BYTES,
    ) -> None:
        if any(module.training for module in model.modules()):
            raise ValueError("the model is in training mode, in which its units compute something else every time")
        self.on_gradient: Callable[[int, Gradient], None] | None = None
        self.on_backward_unit_done: Callable[[Unit], None] | None = None
        self.spilled = 0
        self._folder = spill
        self._layers = {model.get_submodule(layer.name): layer for layer in layers if layer.experts is None}
        self._stacks: dict[nn.Module, dict[str, Layer]] = {}  # of each experts module, by projection
        for stack in layers:
            if stack.experts is not None:
                self._stacks.setdefault(module_of(model, stack), {})[stack.name.rpartition(".")[2]] = stack
        self._wrapped: set[nn.Module] = set()
        self._own_hooks = hook_ids(model)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._spill: Spill | None = None  # set in `run_backward` only
        self._tapes: list[Tape] = []
        self._visits: list[Visit] = []
        self._load_numbers: Counter[Unit] = Counter()
        self._replaying = False
        self._borrowed: list[Unit] = []
        self._reported = False
        super().__init__(model, weights, device=device, max_unit_bytes=max_unit_bytes)

    def run_backward(
        self,
        calls: Sequence[Callable[[], Any]],
        loss: Callable[[int, Any], torch.Tensor],
        done: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        """Run all `calls`, and for each the backward of `loss(index, result)`, a scalar; `done` takes the losses.

        Give `use_cache=False` to models that know it. An exception, including Ctrl-C, unwinds all batches and is
        raised here; afterwards the model is as before. Raises `InputError` if no loss depends on any layer or the disk
        is full, `UnsupportedError` for what the module's docstring calls refused.
        """
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        with Spill(self._folder) as spill, hooks:
            self._spill, self._reported = spill, False
            try:
                self.run([functools.partial(self._differentiate, *each, loss) for each in enumerate(calls)], done)
            finally:
                self.spilled = spill.written
                self._spill = None
                self._tapes, self._visits = [], []
        if not self._reported:
            raise InputError("no loss depends on any of the chosen layers")

    def _schedule(self, tasks: Sequence[Task]) -> None:
        self._tapes = [Tape(task, self._anchor) for task in tasks]
        super()._schedule(tasks)
        if self._spill is not None:
            self._reverse_visits(self._spill)

    def _differentiate(
        self, index: int, call: Callable[[], Any], loss: Callable[[int, Any], torch.Tensor]
    ) -> torch.Tensor:
        """One batch: its forward, its loss's backward, and that of the units that are still loaded."""
        tape = self._tapes[index]
        with torch.enable_grad():
            value = loss(index, call())
            tape.end()
            if value.requires_grad:
                # Retained: what lies between units is passed through again from units further up.
                torch.autograd.backward(value, retain_graph=True)
            result = value.detach()
            del value  # and with it the graph of the logits
        while tape.calls and tape.calls[-1].visit.unit.loaded:
            self._reverse(tape.calls[-1])
        return result

    def _hooks(self, unit: Unit) -> Iterator[OtherForward]:
        for module in unit.module.modules():
            # As in the forward, modules inside a unit ask for weights too: the model may call them directly.
            has_own = any(parameter is not None for parameter in module._parameters.values())
            if (module is unit.module or has_own) and module not in self._wrapped:
                self._wrapped.add(module)
                yield OtherForward(module, self._wrapper(unit, module))

    def _wrapper(self, unit: Unit, module: nn.Module) -> Callable[..., Any]:
        """The module's forward, which now waits for its weights and is recorded, or takes part in a replay."""
        forward, layer = module.forward, self._layers.get(module)
        with_tap = forward if layer is None else tapped(layer, forward, self._report)
        if module in self._stacks:
            with_tap = tapped_experts(module, self._stacks[module], self._report)
        has_layers = any(member in self._layers or member in self._stacks for member in module.modules())

        def run(*args: Any, **kwargs: Any) -> Any:
            return (with_tap if self._replaying else forward)(*args, **kwargs)

        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._replaying:
                self._borrow(unit)
                return run(*args, **kwargs)
            if unit in self._running_task().held:
                return run(*args, **kwargs)
            self._enter(unit)
            try:
                return self._call(unit, run, has_layers, args, kwargs)
            finally:
                self._leave(unit)

        return wrapper

    def _call(
        self, unit: Unit, run: Callable[..., Any], has_layers: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._spill is None:
            return run(*args, **kwargs)
        args, kwargs = loaded((args, kwargs))  # a placeholder cannot be kept for the second run
        leaves = tree_leaves((args, kwargs))
        needs = any(leaf.requires_grad for leaf in leaves if isinstance(leaf, torch.Tensor)) or carries_gradient(leaves)
        if not torch.is_grad_enabled() or not (has_layers or needs):
            with torch.no_grad():  # before the first layer that matters, or where the model itself wants no gradient
                return run(*args, **kwargs)
        return self._tapes[self.current].record(self._visit(unit, self._spill), run, args, kwargs, self._spill)

    def _visit(self, unit: Unit, spill: Spill) -> Visit:
        """The visit that is going on; a new one if the unit has been loaded again, or another one used, since."""
        number = self._load_numbers[unit]
        if not self._visits or self._visits[-1].unit is not unit or self._visits[-1].load != number:
            self._visits.append(Visit(unit, number, spill.size))
        return self._visits[-1]

    def _park(self, unit: Unit) -> None:
        if self._spill is not None:
            self._tapes[self.current].pause(self._spill)
        super()._park(unit)

    def _pack(self, tensor: torch.Tensor) -> Saved:
        """What autograd holds instead of a tensor."""
        if not self._replaying and self._task is not None:
            return self._tapes[self._task.index].saved(tensor)
        return Saved(tensor)

    def _unpack(self, saved: Saved) -> torch.Tensor:
        assert self._spill is not None  # the graph is used in `run_backward` only
        return saved.load(self._spill)

    def _reverse_visits(self, spill: Spill) -> None:
        """The backward of all batches, after the forward of all."""
        left = Counter(visit.unit for visit in self._visits)
        self._forget_shared()
        while self._visits:
            visit = self._visits.pop()
            if any(call.reached for call in visit.calls):
                self._load(visit.unit)
            while visit.calls:
                self._reverse(visit.calls[-1])
            if visit.unit.loaded:
                self._free(visit.unit)
            spill.truncate(visit.mark)  # what was written since has been read by those calls, or by later ones
            left[visit.unit] -= 1
            if left[visit.unit] == 0 and self.on_backward_unit_done is not None:
                self.on_backward_unit_done(visit.unit)

    def _reverse(self, call: Call) -> None:
        """The backward of the last call on a tape; its unit is loaded if a gradient arrived for the call."""
        tape = self._tapes[call.batch]
        if call.reached:
            self._replay(tape, call)
        tape.retire(call)

    def _replay(self, tape: Tape, call: Call) -> None:
        assert self._spill is not None  # calls are recorded in `run_backward` only
        running = self._task
        self._task, self._replaying = tape.task, True
        try:
            with without_hooks(self.model, keep=self._own_hooks):
                call.replay(self._spill)
        finally:
            self._task, self._replaying = running, False
            for unit in self._borrowed:
                self._free(unit)
            self._borrowed.clear()

    def _borrow(self, unit: Unit) -> None:
        """Load a unit that is called from inside of another one, for the time of a replay."""
        if not unit.loaded:
            self._load(unit)
            self._borrowed.append(unit)

    def _report(self, gradient: Gradient) -> None:
        self._reported = True
        if self.on_gradient is not None:
            self.on_gradient(self.current, gradient)

    def _forget_shared(self) -> None:
        """Drop tensors of several units that no visit needs any more, such as the embeddings below a tied head."""
        needed = {name for visit in self._visits if visit.calls for name in self._sources(visit.unit.slots)}
        needed |= self._used_directly
        self._kept = {name: tensor for name, tensor in self._kept.items() if name in needed}

    def _load(self, unit: Unit) -> None:
        self._load_numbers[unit] += 1
        super()._load(unit)

    def _free(self, unit: Unit) -> None:
        super()._free(unit)
        give_heap_back()
