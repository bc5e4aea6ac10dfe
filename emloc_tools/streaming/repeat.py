"""Whether a module can be run a second time on the same input with the same result, as a recomputation has to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PROJECTIONS = 4
DEPTH = 5  # how far into nested objects a state is followed


def state_of(values: Sequence[Any], depth: int = DEPTH) -> list[Any]:
    """What shows whether opaque arguments (anything but tensors, such as a key-value cache) were changed by a call.

    Of tensors inside them: shape, address and version.
    """
    return [_state(value, depth) for value in values if not isinstance(value, torch.Tensor)]


def _state(value: Any, depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.data_ptr(), version(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth == 0:
        return id(value)
    if isinstance(value, (list, tuple)):
        return [_state(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {key: _state(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (nn.Module, type)) or callable(value) or not hasattr(value, "__dict__"):
        return id(value)
    return {key: _state(item, depth - 1) for key, item in vars(value).items()}


def carries_gradient(values: Sequence[Any], depth: int = DEPTH) -> bool:
    """Whether an opaque argument holds tensors that require gradients: they would be lost."""
    return any(_carries(value, depth) for value in values if not isinstance(value, torch.Tensor))


def _carries(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if depth == 0 or isinstance(value, (nn.Module, type)):
        return False
    if isinstance(value, dict):
        return any(_carries(item, depth - 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_carries(item, depth - 1) for item in value)
    return hasattr(value, "__dict__") and any(_carries(item, depth - 1) for item in vars(value).values())


def version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was changed in place; tensors of inference mode do not tell."""
    return None if tensor.is_inference() else tensor._version


def sketch(y: torch.Tensor) -> torch.Tensor:
    """`(1 + PROJECTIONS,)` float64: the Frobenius norm of y, and its inner products with random matrices a bᵀ.

    The mean square of an inner product is the squared norm, for every y and so for the difference of two: sketches
    that agree mean that the tensors do, unlike sums or samples of entries. The random vectors depend on the shape only.
    """
    y = y.detach()
    if y.is_complex():
        y = torch.view_as_real(y)
    if y.dtype == torch.float16:
        y = y.float()  # sums of many values leave the range of fp16
    rows = y.reshape(-1, y.shape[-1]) if y.dim() else y.reshape(1, 1)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PROJECTIONS, size, generator=generator).to(y.device) for size in rows.shape)
    products = ((a.to(y.dtype) @ rows).double() * b.double()).sum(1)
    accumulate = torch.float64 if y.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(rows, dtype=accumulate).double()
    return torch.cat([norm.reshape(1), products])


def agree(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two sketches belong to one tensor of `dtype`, up to rounding of another kernel for the same sums."""
    finite = first.isfinite()
    if not torch.equal(finite, second.isfinite()):
        return False
    difference = (first - second)[finite].abs().max() if finite.any() else torch.zeros(())
    scale = first[0] if finite[0] else first[finite].abs().sum()
    return bool(difference <= torch.finfo(dtype).eps ** 0.5 * scale)


def differentiable(tensor: torch.Tensor) -> bool:
    """Whether a tensor of its dtype can carry a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()
