"""Put a LoRA, and a share of the emulator's error, into the dense weight of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emloc_tools.errors import NumericalError

BLOCK = 1 << 22  # values of W that are worked on at a time, so that float32 copies stay small beside W


def merge_weight(
    W: torch.Tensor,
    *,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    factors: Sequence[torch.Tensor] | None = None,
    share: float = 0.0,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """`W − T (W − W_E) + s B A (out, in)`, computed in float32 and rounded once to `dtype` (W's own by default).

    `lora` is `A (r, in)`, `B (out, r)` and the scaling s; `factors` are U, S, Vh with `W_E = U diag(S) Vh`, and
    `share` is T, 0 to 1. With T = 1 the base's weight is left out exactly, and not up to rounding. W is overwritten and
    returned if it has the wanted dtype, so that memory holds one weight and a few blocks of rows; strides are kept.
    A float64 W is computed in float64. Raises `NumericalError` if the result is not finite in `dtype`.
    """
    merged = W if dtype in (None, W.dtype) else torch.empty_like(W, dtype=dtype)
    working = torch.promote_types(W.dtype, torch.float32)
    A = B = U = Vh = None
    scaling = 0.0
    if lora is not None:
        A, B, scaling = lora[0].to(device, working), lora[1].to(device, working), lora[2]
    if factors is not None:
        U, S, Vh = (factor.to(device, working) for factor in factors)
        U = U * S
    step = max(1, BLOCK // max(W.shape[1], 1))
    for first in range(0, W.shape[0], step):
        rows = slice(first, first + step)
        block = W[rows].to(device, working)
        if U is not None and Vh is not None:
            block = torch.lerp(block, U[rows] @ Vh, share)
        if A is not None and B is not None:
            block = torch.addmm(block, B[rows], A, alpha=scaling)
        rounded = block.to(merged.dtype)
        low, high = torch.aminmax(rounded)  # carries NaN through, and needs no temporary tensor
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise NumericalError(f"the merged weight is beyond what {merged.dtype} holds; choose a wider --dtype")
        merged[rows] = rounded.to(merged.device)
    return merged
