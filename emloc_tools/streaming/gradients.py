"""The gradient of a loss at a linear layer, on the layer's smaller side, while autograd passes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from emloc_tools.records import Layer, Side


@dataclass(frozen=True)
class Gradient:
    """What one call of a layer `y = W x + b` contributes to the second moments of the gradient `g` of a loss at y.

    `rows` has the layer's leading dimensions, usually `(batch, length)`, so that padding can be dropped, and the
    model's dtype. On the side `output` it is `g (..., out)`; on the side `input`, for layers with out > in, `Wᵀg
    (..., in)`, of which `Σ (Wᵀg)(Wᵀg)ᵀ = Wᵀ (Σ g gᵀ) W`. `squares (...,)` is `‖g‖²` of every row in float32 (float64
    for float64 models): its sum is the trace of `Σ g gᵀ`, on either side.

    An expert reads some rows of its module's input only: then `tokens (rows,)` says which of the `of` rows these are.
    """

    layer: str
    side: Side
    rows: torch.Tensor
    squares: torch.Tensor
    tokens: torch.Tensor | None = None
    of: int = 0


def gradient_side(layer: Layer) -> Side:
    """The side on which the gradient has fewer entries."""
    return "output" if layer.out_features <= layer.in_features else "input"


def tapped(
    layer: Layer, forward: Callable[..., torch.Tensor], report: Callable[[Gradient], None]
) -> Callable[..., torch.Tensor]:
    """A layer's `forward` that, run with gradients enabled, reports the gradient of each of its calls in the backward.

    `Wᵀg` is what autograd computes for the layer's input anyway. To have this layer's share alone, and not the sum
    over all that read the same tensor, the layer reads a private view of it. So no product with W is added.
    """
    side = gradient_side(layer)

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        squares: list[torch.Tensor] = []
        if side == "input":
            args, kwargs = _with_private_input(args, kwargs, lambda g: report(_gradient(g.detach(), squares.pop())))
        y = forward(*args, **kwargs)
        if not y.requires_grad:
            # The first layer that a gradient is wanted for. Not a leaf: the model may change it in place.
            y = y.detach().requires_grad_().clone()
        # A layer with a bias returns a view of its result when its input has three dimensions. Changing a view in
        # place gives it a new place in the graph, and a hook on it would never be called: the base keeps its own.
        y = _plain_view(y)
        written = y._base if y._is_view() and y._base is not None else y
        shape = y.shape

        def see(g: torch.Tensor) -> None:
            g = g.detach().reshape(shape)
            dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
            squared = torch.linalg.vector_norm(g, dim=-1, dtype=dtype).square()
            if side == "output":
                report(_gradient(g, squared))
            else:
                squares.append(squared)

        written.register_hook(see)  # type: ignore[no-untyped-call]
        return y

    def _gradient(rows: torch.Tensor, squares: torch.Tensor) -> Gradient:
        return Gradient(layer.name, side, rows, squares)

    return run


def _with_private_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hook: Callable[[torch.Tensor], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    view = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    view.register_hook(hook)  # type: ignore[no-untyped-call]
    return ((view, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): view})


def _plain_view(y: torch.Tensor) -> torch.Tensor:
    """y itself, unless it is a view of only a part of its base, or in another order: then a copy."""
    base = y._base if y._is_view() else None
    if base is None or (base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous()):
        return y
    return y.clone()
