"""Run a streamed model with LoRA adapters, without building a PEFT model around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from emloc_tools.errors import MismatchError


@dataclass(frozen=True)
class LoraPair:
    """`A (r, in)`, `B (out, r)` and the scaling s of one module: its output gains `s B A x`."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def match_module(name: str, modules: Collection[str]) -> str | None:
    """The module that an adapter's module name means: the same, or one that differs by a leading prefix only.

    A model class with a head and one without name the same module `model.layers.0` and `layers.0`.
    """
    if name in modules:
        return name
    matches = [module for module in modules if module.endswith(f".{name}") or name.endswith(f".{module}")]
    return matches[0] if len(matches) == 1 else None


def attach_loras(
    model: nn.Module, adapters: Sequence[Mapping[str, LoraPair]], active: Callable[[], int | None]
) -> list[Any]:
    """Hook the adapters' pairs into `model`; `active()` says which adapter applies to the running batch, if any.

    The pairs' products are taken in float32. Returns the hooks' handles. Raises `MismatchError` for a pair that fits
    no module.
    """
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    pairs: dict[str, dict[int, LoraPair]] = {}
    for index, adapter in enumerate(adapters):
        for name, pair in adapter.items():
            target = match_module(name, modules)
            if target is None:
                raise MismatchError(f"the adapter's module {name} is not in {type(model).__name__}")
            pairs.setdefault(target, {})[index] = pair
    return [
        modules[name].register_forward_hook(_adding(by_adapter, active), with_kwargs=True)
        for name, by_adapter in pairs.items()
    ]


def _adding(by_adapter: Mapping[int, LoraPair], active: Callable[[], int | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        index = active()
        pair = None if index is None else by_adapter.get(index)
        if pair is None:
            return None  # leaves the output as it is
        x = (args[0] if args else next(iter(kwargs.values()))).float()
        A, B = pair.A.to(x.device, torch.float32), pair.B.to(x.device, torch.float32)
        return output + (pair.scaling * F.linear(F.linear(x, A), B)).to(output.dtype)

    return hook
