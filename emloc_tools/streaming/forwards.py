"""Step into the place of a module's `forward`, and silence hooks for a while."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn


class OtherForward:
    """Another `forward` for one module, until it is removed."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._before = module, module.__dict__.get("forward")
        module.forward = forward

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self._before is None:
            del self._module.forward
        else:
            self._module.forward = self._before


def hook_ids(model: nn.Module) -> set[int]:
    """The forward and forward-pre hooks of all modules; torch gives each an id of its own."""
    return {key for module in model.modules() for hooks in _hooks(module).values() for key in hooks}


@contextlib.contextmanager
def without_hooks(model: nn.Module, *, keep: Collection[int]) -> Iterator[None]:
    """Take away all forward and forward-pre hooks but those in `keep`."""
    taken: list[tuple[nn.Module, str, OrderedDict[int, Any]]] = []
    try:
        for module in model.modules():
            for name, hooks in _hooks(module).items():
                if any(key not in keep for key in hooks):
                    taken.append((module, name, hooks))
                    setattr(module, name, OrderedDict((key, hook) for key, hook in hooks.items() if key in keep))
        yield
    finally:
        for module, name, hooks in taken:
            setattr(module, name, hooks)


def _hooks(module: nn.Module) -> dict[str, OrderedDict[int, Any]]:
    return {name: getattr(module, name) for name in ("_forward_pre_hooks", "_forward_hooks")}
