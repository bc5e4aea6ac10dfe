"""Lock-step forward: run many batches through a model that is larger than memory, reading every weight once.

Each batch runs the model's own, unmodified `forward` in a greenlet. The model is cut into units (usually its blocks).
When a batch is about to enter a unit whose weights are not loaded, it is parked; the scheduler loads the unit, lets
every parked batch through, frees it and goes on. So peak memory holds one unit, the activations of all batches between
two units, and nothing that grows with depth. Running blocks one after the other by hand, as calibration pipelines
usually do, is silently wrong for models whose forward does more between blocks.

Greenlets and not threads: every thread brings its own OpenMP team and gradient mode, and a switch costs 35 times more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import greenlet
import torch
from torch import nn

from emloc_tools.models.weights import ModelWeights
from emloc_tools.streaming.memory import Arena, keep_heap_flat
from emloc_tools.streaming.placeholders import Placeholders
from emloc_tools.streaming.units import Slot, Unit, partition, put, value

MAX_UNIT_BYTES = 4 << 30  # a larger block is cut into its children


class Task:
    """One batch on its way through the model."""

    def __init__(self, index: int, body: Callable[[], None], scheduler: greenlet.greenlet) -> None:
        self.index = index
        self.held: list[Unit] = []  # units that the batch is inside of, outermost first
        self._scheduler = scheduler
        self._greenlet = greenlet.greenlet(body, parent=scheduler)

    def resume(self) -> None:
        """Run until the batch parks or ends; its exceptions come out here."""
        self._greenlet.switch()

    def park(self) -> None:
        """Give control back to the scheduler. The gradient mode belongs to the thread, so each batch keeps its own."""
        gradients = torch.is_grad_enabled()
        self._scheduler.switch()
        torch.set_grad_enabled(gradients)

    def kill(self) -> None:
        """Unwind the batch's stack. A bare GreenletExit is the one exception that does not reach the parent."""
        if not self._greenlet.dead:
            self._greenlet.throw()


class LockStep:
    """Runs batches through `model` (parameters on meta) with the weights of `weights`.

    `on_leave(task_index, unit)` is called when a batch that was let through a unit waits again or has ended, while the
    weights that it used are still loaded; `on_unit_done(unit)` when every waiting batch has passed, after the weights
    are freed. A unit that the model uses several times may be done several times. `current` is the index of the batch
    that runs at the moment. Parameters that belong to no unit are loaded at once and stay.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: ModelWeights,
        *,
        device: str | torch.device = "cpu",
        max_unit_bytes: int = MAX_UNIT_BYTES,
    ) -> None:
        keep_heap_flat()
        self.model, self.weights, self.device = model, weights, torch.device(device)
        self.on_leave: Callable[[int, Unit], None] | None = None
        self.on_unit_done: Callable[[Unit], None] | None = None
        self._task: Task | None = None
        self._parked: dict[Unit, deque[Task]] = {}
        self._arenas: list[Arena] = []
        self._kept: dict[str, torch.Tensor] = {}
        self.units, self._resident = partition(model, weights, max_unit_bytes)
        self._shared = self._sources_of_several_units()
        self._used_directly: set[str] = set()
        _move_buffers(model, self.device)
        self._fill(self._resident, self.weights.load(self._sources(self._resident)))
        self._handles = [handle for unit in self.units for handle in self._hooks(unit)]
        slots = (slot for unit in self.units for slot in unit.slots)
        self._handles.append(Placeholders(slots, self.device, self._weight))

    @property
    def current(self) -> int:
        """Index of the batch that is running."""
        if self._task is None:
            raise RuntimeError("no batch is running")
        return self._task.index

    def run(self, calls: Sequence[Callable[[], Any]], done: Callable[[int, Any], None] | None = None) -> None:
        """Run all `calls` (each the forward of one batch) to their end; `done(index, result)` takes the results.

        An exception in any batch, including Ctrl-C, unwinds all others and is raised here; afterwards the model is as
        before.
        """
        scheduler = greenlet.getcurrent()

        def body(index: int, call: Callable[[], Any]) -> None:
            result = call()
            if done is not None:
                done(index, result)

        tasks = [
            Task(index, lambda index=index, call=call: body(index, call), scheduler)  # type: ignore[misc]
            for index, call in enumerate(calls)
        ]
        with torch.no_grad():
            try:
                self._schedule(tasks)
            finally:
                for task in tasks:
                    self._task = task
                    task.kill()
                self._task = None
                self._parked.clear()
                for unit in self.units:
                    unit.inside = 0
                    if unit.loaded:
                        self._free(unit)
                self._kept.clear()

    def close(self) -> None:
        """Remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _schedule(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._step(task)
        passed: list[Unit] = []
        while waiting := [unit for unit, queue in self._parked.items() if queue]:
            # A loaded unit first; else the earliest, which keeps batches that skip a part of the model together.
            unit = min(waiting, key=lambda unit: (not unit.loaded, unit.rank))
            if not unit.loaded:
                self._load(unit)
            queue = self._parked[unit]
            while queue:
                task = queue.popleft()
                self._step(task)
                # Not at the unit's own end: layers that the model calls outside their unit's forward count too, and
                # so does a unit that is a layer, whose observers' hooks come after ours.
                if self.on_leave is not None:
                    self.on_leave(task.index, unit)
            passed.append(unit)
            for candidate in [unit for unit in passed if unit.inside == 0]:
                passed.remove(candidate)
                if candidate.loaded:
                    self._free(candidate)
                    if self.on_unit_done is not None:
                        self.on_unit_done(candidate)

    def _step(self, task: Task) -> None:
        self._task = task
        try:
            with torch.no_grad():  # the batch may leave another mode behind when it parks
                task.resume()
        finally:
            self._task = None

    def _hooks(self, unit: Unit) -> Iterator[Any]:
        yield unit.module.register_forward_pre_hook(lambda module, args: self._enter(unit))
        yield unit.module.register_forward_hook(lambda module, args, output: self._leave(unit), always_call=True)
        for module in unit.module.modules():
            # Some models call a block's children directly; then these ask for the weights.
            if module is not unit.module and any(p is not None for p in module._parameters.values()):
                yield module.register_forward_pre_hook(lambda module, args: self._demand(unit))

    def _enter(self, unit: Unit) -> None:
        task = self._running_task()
        if unit not in task.held:
            self._park(unit)
            unit.inside += 1
        task.held.append(unit)

    def _leave(self, unit: Unit) -> None:
        task = self._task
        if task is None or unit not in task.held:
            return
        task.held.remove(unit)
        if unit not in task.held:
            unit.inside -= 1

    def _demand(self, unit: Unit) -> None:
        if unit not in self._running_task().held:
            self._park(unit)

    def _park(self, unit: Unit) -> None:
        task = self._running_task()
        self._parked.setdefault(unit, deque()).append(task)
        task.park()

    def _running_task(self) -> Task:
        if self._task is None:
            raise RuntimeError("the model has no weights of its own: call LockStep.run")
        return self._task

    def _load(self, unit: Unit) -> None:
        names = self._sources(unit.slots) - set(self._kept)
        passing = names - self._shared
        unit.arena = next((arena for arena in self._arenas if arena.idle), None) or Arena()
        if unit.arena in self._arenas:
            self._arenas.remove(unit.arena)
        unit.arena.reserve(self.weights.copied_bytes(passing))
        data = self.weights.load(passing, self._read_into(unit.arena))
        data.update(self.weights.load(names & self._shared))
        unit.placeholders = [value(slot) for slot in unit.slots]
        unit.loaded = True  # should filling fail half way, freeing puts everything back
        filled = self._fill(unit.slots, {**self._kept, **data})
        self._kept.update({name: tensor for name, tensor in filled.items() if name in self._shared})

    def _weight(self, slot: Slot) -> torch.Tensor | None:
        """A weight that the model uses without calling the module that owns it, once it runs.

        It stays loaded as a shared one does: there is no telling when it will be used again.
        """
        if self._task is None:
            return None
        source = self.weights.source_of[slot[3]]
        if source not in self._kept:
            self._shared.add(source)
            self._used_directly.add(source)
            stored = self.weights.load([source])[source]
            self._kept[source] = stored.to(device=self.device, dtype=value(slot).dtype)
        return self._kept[source]

    def _free(self, unit: Unit) -> None:
        for slot, placeholder in zip(unit.slots, unit.placeholders, strict=True):
            put(slot, placeholder)
        unit.placeholders = []
        unit.loaded = False
        if unit.arena is not None:
            self._arenas.append(unit.arena)
            unit.arena = None

    def _read_into(self, arena: Arena) -> Callable[[str], torch.Tensor]:
        tensors = self.weights.tensors
        return lambda key: tensors.read(key, arena.take(tensors.spec(key).nbytes))

    def _fill(self, slots: Sequence[Slot], data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put tensors in their slots, on the device and in the dtype that the model wants; tied slots share one."""
        filled: dict[str, torch.Tensor] = {}
        for slot in slots:
            source = self.weights.source_of[slot[3]]
            if source not in filled:
                filled[source] = data[source].to(device=self.device, dtype=value(slot).dtype)
            put(slot, filled[source])
        return filled

    def _sources(self, slots: Sequence[Slot]) -> set[str]:
        return {self.weights.source_of[name] for *_, name in slots}

    def _sources_of_several_units(self) -> set[str]:
        """Tensors that more than one unit uses (tied embeddings): they stay after their first use."""
        seen: set[str] = set()
        shared: set[str] = set()
        for unit in self.units:
            sources = self._sources(unit.slots)
            shared |= sources & seen
            seen |= sources
        return shared


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
