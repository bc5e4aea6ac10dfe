"""Lock-step forward: run many batches through a model that is larger than memory, reading every weight once.

Each batch runs the model's own, unmodified `forward` in a greenlet. The model is cut into units (usually its blocks).
When a batch is about to enter a unit whose weights are not loaded, it is parked; the scheduler loads the unit, lets
every parked batch through, frees it and goes on. So peak memory holds one unit, the activations of all batches between
two units, and nothing that grows with depth. Running blocks one after the other by hand, as calibration pipelines
usually do, is silently wrong for models whose forward does more between blocks.

Greenlets and not threads: every thread brings its own OpenMP team and gradient mode, and a switch costs 35 times more.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import greenlet
import numpy as np
import torch
from torch import nn

from emloc_tools.models.weights import ModelWeights

MAX_UNIT_BYTES = 4 << 30  # a larger block is cut into its children
ALIGNMENT = 64

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
        """Give control back to the scheduler."""
        self._scheduler.switch()

    def kill(self) -> None:
        """Unwind the batch's stack. A bare GreenletExit is the one exception that does not reach the parent."""
        if not self._greenlet.dead:
            self._greenlet.throw()


class Arena:
    """Reused memory for the plain tensors of one unit, so that reading neither allocates nor fragments the heap."""

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.uint8)
        self._used = 0
        self._idle_references = sys.getrefcount(self._block)

    def reserve(self, sizes: Sequence[int]) -> None:
        """Make room for tensors of the given sizes in bytes and start anew."""
        needed = sum(_aligned(size) for size in sizes)
        if needed > self._block.size:
            self._block = np.empty(needed, dtype=np.uint8)
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        """The next `size` bytes, as a 1-D uint8 tensor."""
        piece = torch.from_numpy(self._block[self._used : self._used + size])
        self._used += _aligned(size)
        return piece

    @property
    def idle(self) -> bool:
        """Whether no tensor outside still looks into the memory, such as a module's output that is its own weight."""
        return sys.getrefcount(self._block) <= self._idle_references


class LockStep:
    """Runs batches through `model` (parameters on meta) with the weights of `weights`.

    `on_leave(task_index, unit)` is called when a batch leaves a unit for good, while its weights are loaded;
    `on_unit_done(unit)` when every waiting batch has passed, after the weights are freed. A unit that the model uses
    several times is done several times. `current` is the index of the batch that runs at the moment.
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
        self.units, self._resident = _partition(model, weights, max_unit_bytes)
        self._shared = self._sources_of_several_units()
        self._handles = [handle for unit in self.units for handle in self._hooks(unit)]
        _move_buffers(model, self.device)
        self._fill(self._resident, self.weights.load(self._sources(self._resident)))

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
        try:
            with torch.no_grad():
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
                self._step(queue.popleft())
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
            # An exception on its way through the model must not be replaced by one from the observer.
            if self.on_leave is not None and sys.exc_info()[0] is None:
                self.on_leave(task.index, unit)

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
        unit.placeholders = [_get(slot) for slot in unit.slots]
        filled = self._fill(unit.slots, {**self._kept, **data})
        self._kept.update({name: tensor for name, tensor in filled.items() if name in self._shared})
        unit.loaded = True

    def _free(self, unit: Unit) -> None:
        for slot, placeholder in zip(unit.slots, unit.placeholders, strict=True):
            _set(slot, placeholder)
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
                filled[source] = data[source].to(device=self.device, dtype=_get(slot).dtype)
            _set(slot, filled[source])
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


def _partition(model: nn.Module, weights: ModelWeights, max_unit_bytes: int) -> tuple[list[Unit], list[Slot]]:
    """Cut a model into units; what directly belongs to a container (a stray position embedding) stays resident.

    A unit is an element of a ModuleList or Sequential, or a module with parameters of its own, up to the size
    limit; else its children are looked at.
    """
    units: list[Unit] = []
    resident: list[Slot] = []
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module, in_list: bool) -> None:
        slots = [] if module in seen else _slots(name, module, weights, recurse=True)
        if not slots:
            return
        own = _slots(name, module, weights, recurse=False)
        leaf = not any(True for child in module.children() for _ in child.parameters())
        holds_blocks = any(isinstance(child, nn.ModuleList) for child in module.modules())
        whole = (in_list or (bool(own) and not holds_blocks)) and _nbytes(slots) <= max_unit_bytes
        if _has_forward(module) and module is not model and (leaf or whole):
            units.append(Unit(name, module, len(units), slots))
            seen.update(module.modules())
            return
        resident.extend(own)
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            visit(path, child, isinstance(module, (nn.ModuleList, nn.Sequential)))

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


def _get(slot: Slot) -> torch.Tensor:
    owner, attribute, is_buffer, _ = slot
    tensor = (owner._buffers if is_buffer else owner._parameters)[attribute]
    assert tensor is not None  # slots are made of tensors that exist
    return tensor


def _set(slot: Slot, tensor: torch.Tensor) -> None:
    owner, attribute, is_buffer, _ = slot
    if is_buffer:
        owner._buffers[attribute] = tensor
    else:
        is_parameter = isinstance(tensor, nn.Parameter)
        owner._parameters[attribute] = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)


def _nbytes(slots: Sequence[Slot]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in map(_get, slots)}.values())


def _has_forward(module: nn.Module) -> bool:
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList)
    return not isinstance(module, containers) and type(module).forward is not nn.Module.forward


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def keep_heap_flat() -> None:
    """Fix glibc's threshold above which memory is mapped, and so given back at once when freed.

    By default the threshold grows with use, blocks go to the heap, and the resident size creeps up with depth.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            m_mmap_threshold = -3
            ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)
