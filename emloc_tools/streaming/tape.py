"""The calls of units that one batch makes in its forward, and how gradients pass from each to the earlier ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from emloc_tools.errors import UnsupportedError
from emloc_tools.streaming.calls import Argument, Call, Result, Visit
from emloc_tools.streaming.graph import Saved, Sink, Slot, Source, cut
from emloc_tools.streaming.repeat import carries_gradient, differentiable, sketch, state_of, version
from emloc_tools.streaming.spill import Spill
from emloc_tools.streaming.stream import Task
from emloc_tools.streaming.units import Unit

SMALL = 256  # bytes; tensors up to here stay in memory: a node of the graph costs more


class Tape:
    """The calls of one batch in the order of its forward, and the sinks of the tensors that they read."""

    def __init__(self, task: Task, anchor: torch.Tensor) -> None:
        self.task = task
        self.calls: list[Call] = []
        self.sinks: dict[Any, Slot] = {}
        self._anchor = anchor
        self._fresh: list[weakref.ref[Saved]] = []
        self._aliases: list[tuple[torch.Tensor, int | None, str]] = []

    def record(
        self, visit: Visit, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], spill: Spill
    ) -> Any:
        """Run a call without gradients and record it; the result is as the graph is to see it.

        Raises `UnsupportedError` for arguments whose state the call changes, or whose gradients cannot be followed.
        """
        leaves, spec, unit = *tree_flatten((args, kwargs)), visit.unit
        if carries_gradient(leaves):
            raise UnsupportedError(
                f"{unit.name} gets an argument of an unknown kind with tensors in it that need gradients; the streamed "
                "backward cannot follow them"
            )
        call = Call(self.task.index, visit, run, spec)
        self._store(call, leaves, spill)
        versions, state = [version(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)], state_of(leaves)
        with torch.no_grad():
            result = run(*args, **kwargs)
        leaves_after, spec_after = tree_flatten((args, kwargs))
        unchanged = spec_after == spec and all(one is other for one, other in zip(leaves_after, leaves, strict=True))
        if not unchanged or state_of(leaves) != state:
            raise UnsupportedError(
                f"{unit.name} changes the state of one of its arguments, so it cannot be run a second time; if that is "
                "a key-value cache, pass use_cache=False"
            )
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        result, new = self._enter(call, result, tensors)
        for tensor in new:
            spill.forget(tensor)
        entries = [leaf for leaf in call.leaves if isinstance(leaf, Argument)]
        for tensor, before, entry in zip(tensors, versions, entries, strict=True):
            if version(tensor) != before and entry.after is None and differentiable(tensor):
                entry.after = Result(Slot(), sketch(tensor))
                cut(tensor, self._anchor, entry.after.slot)
        self._watch_aliases(new, tensors, unit)
        self.calls.append(call)
        visit.calls.append(call)
        return result

    def retire(self, call: Call) -> None:
        """Take off the last call, which has been replayed, and send up the gradients that are complete with it.

        These are the gradients of the arguments that no earlier call used.
        """
        assert self.calls[-1] is call  # the backward goes through the calls in reverse
        self.calls.pop()
        call.visit.calls.remove(call)
        for key, _, _ in call.firsts:
            del self.sinks[key]
        scalars = [scalar for _, scalar, slot in call.firsts if slot.gradient is not None]
        call.firsts.clear()
        if scalars:
            # Retained: the gradients of several calls may run through the same nodes.
            torch.autograd.backward(scalars, retain_graph=True)

    def saved(self, tensor: torch.Tensor) -> Saved:
        """Keep a tensor for a node of the graph."""
        saved = Saved(tensor)
        if tensor.nbytes > SMALL:
            self._fresh.append(weakref.ref(saved))  # weak: most nodes are gone before the batch parks
        return saved

    def pause(self, spill: Spill) -> None:
        """The batch is about to park: move to disk what the graph has saved since the last time."""
        self._check_aliases()
        for reference in self._fresh:
            saved = reference()
            if saved is not None:
                saved.move(spill)
        self._fresh.clear()

    def end(self) -> None:
        """The batch's forward has ended: what the graph still holds is about to be used."""
        self._check_aliases()
        self._fresh.clear()

    def _store(self, call: Call, leaves: Iterable[Any], spill: Spill) -> None:
        """Store the arguments as they are before the call; modules may ask whether two are the same tensor."""
        stored: dict[int, Argument] = {}
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in stored:
                    stored[id(leaf)] = Argument(spill.save(leaf), self._sink(call, leaf))
                call.leaves.append(stored[id(leaf)])
            else:
                call.leaves.append(leaf)

    def _sink(self, call: Call, tensor: torch.Tensor) -> Slot | None:
        """The one sink of a tensor. The first call that used it sends its gradient up, as it is reversed last."""
        if not tensor.requires_grad:
            return None
        # The scalar keeps the node alive, or the leaf, and so its identity.
        key = (tensor.grad_fn, tensor.output_nr) if tensor.grad_fn is not None else id(tensor)
        slot = self.sinks.get(key)
        if slot is None:
            slot = Slot()
            scalar = Sink.apply(tensor, self._anchor, slot)  # type: ignore[no-untyped-call]
            if tensor.grad_fn is not None and not tensor._is_view():
                cut(tensor, self._anchor, slot)
                key = (tensor.grad_fn, tensor.output_nr)
            self.sinks[key] = slot
            call.firsts.append((key, scalar, slot))
        return slot

    def _enter(self, call: Call, returned: Any, arguments: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        """What a call returned, with a source for every new tensor, and these. An argument handed back stays itself."""
        leaves, spec = tree_flatten(returned)
        entered = {id(argument): argument for argument in arguments}
        new: list[torch.Tensor] = []
        for leaf in leaves:
            result = None
            if isinstance(leaf, torch.Tensor) and id(leaf) not in entered and differentiable(leaf):
                result = Result(Slot(), sketch(leaf))
                entered[id(leaf)] = Source.apply(self._anchor, [leaf], result.slot)  # type: ignore[no-untyped-call]
                new.append(entered[id(leaf)])
            call.results.append(result)
        return tree_unflatten([entered.get(id(leaf), leaf) for leaf in leaves], spec), new

    def _watch_aliases(self, new: Sequence[torch.Tensor], arguments: Sequence[torch.Tensor], unit: Unit) -> None:
        """Remember new tensors that share memory with each other or with arguments, which the graph does not know."""
        tensors = list({id(tensor): tensor for tensor in (*new, *arguments) if tensor.numel()}.values())
        users = Counter(map(_address, tensors))
        shared = {_address(tensor) for tensor in new if users[_address(tensor)] > 1}
        self._aliases += [(_counter(t), version(t), unit.name) for t in tensors if _address(t) in shared]

    def _check_aliases(self) -> None:
        for counter, before, name in self._aliases:
            if version(counter) != before:
                raise UnsupportedError(
                    f"the model changes in place a tensor that shares its memory with another input or output of "
                    f"{name}; the streamed backward cannot follow that"
                )


def _counter(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor with the version of another one, now and later: watching must not keep memory."""
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return counter


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
