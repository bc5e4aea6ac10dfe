"""What passes each of the fused experts of a running model.

The interchangeable implementations of the experts of transformers read the attributes of a module that describe its
arithmetic; here is one more, which shows what every expert reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from emloc_tools.errors import UnsupportedError
from emloc_tools.models.lowrank_experts import Routing, experts_forward
from emloc_tools.records import Layer
from emloc_tools.streaming.gradients import Gradient, tapped

IMPLEMENTATION = "emloc_observed"  # our name among the implementations of transformers
WATCH = "_emloc_watch"  # attribute of a module that is observed

# What passed one expert: `<projection>.<number>`, its inputs (slots, in), its outputs (slots, out) without bias, which
# rows of the module's input these are, and how many rows that has.
Watch = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, int], None]
One = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def observe_experts(model: Any, watches: Mapping[nn.Module, Watch]) -> None:
    """Let experts modules of `model` run by the implementation of this file, and report to their watches.

    Raises `UnsupportedError` for a model class that does not let its experts be run otherwise.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _observed_forward)
    model.set_experts_implementation(IMPLEMENTATION)
    for module, watch in watches.items():
        config: Any = module.config
        if config._experts_implementation != IMPLEMENTATION:
            raise UnsupportedError(
                f"{type(model).__name__} does not let its experts be observed; leave them out with --exclude experts"
            )
        module.__dict__[WATCH] = watch


def stop_observing(modules: Iterable[nn.Module]) -> None:
    """Take the watches of `observe_experts` away."""
    for module in modules:
        module.__dict__.pop(WATCH, None)


def tapped_experts(
    module: nn.Module, stacks: Mapping[str, Layer], report: Callable[[Gradient], None]
) -> Callable[..., torch.Tensor]:
    """A `forward` of an experts module that reports the gradients of the experts of `stacks` (by their projection).

    As `gradients.tapped`; `Gradient.tokens` says which rows of the module's input the gradients belong to.
    """

    def project(key: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        def one(number: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            if key not in stacks:
                return expert_linear(module, key, number, rows)
            layer = stacks[key].members()[number]
            return tapped(
                layer,
                lambda rows: expert_linear(module, key, number, rows),
                lambda gradient: report(replace(gradient, tokens=tokens, of=routing.rows)),
            )(rows)

        return _projected(module, key, x, routing, one)

    return lambda *args, **kwargs: experts_forward(module, project, *args, **kwargs)


def expert_linear(module: nn.Module, key: str, number: int, x: torch.Tensor) -> torch.Tensor:
    """`W x` of one expert for the rows of `x (tokens, in)`, without bias."""
    W = getattr(module, key)[number]
    return x @ W if module.is_transposed else F.linear(x, W)


def _observed_forward(module: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What transformers calls in place of the module's own forward."""
    watch: Watch | None = module.__dict__.get(WATCH)

    def project(key: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        def one(number: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            y = expert_linear(module, key, number, rows)
            if watch is not None:
                watch(f"{key}.{number}", rows, y, tokens, routing.rows)
            return y

        return _projected(module, key, x, routing, one)

    return experts_forward(module, project, *args, **kwargs)


def _projected(module: nn.Module, key: str, x: torch.Tensor, routing: Routing, one: One) -> torch.Tensor:
    """`one(expert, rows, tokens)` for every expert that has rows, in their order; then the biases."""
    parts, tokens = torch.split(x, routing.counts), torch.split(routing.tokens, routing.counts)
    found = [one(number, parts[number], tokens[number]) for number, slots in enumerate(routing.counts) if slots]
    y = torch.cat(found or [expert_linear(module, key, 0, x)])  # of no rows
    return y + getattr(module, f"{key}_bias")[routing.experts] if module.has_bias else y
