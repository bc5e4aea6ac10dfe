"""Low-rank layers that stand in for nn.Linear and GPT-2's Conv1D, such that PEFT treats them as those.

This file is also pasted, as it is, into every emulator folder, after `four_bits.py`. So it imports nothing but torch
and transformers, and works with transformers 4.56 and later.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from emloc_tools.models.four_bits import FourBits, Product, dequantised, is_quantised

DERIVED = (
    "this layer of an EMLoC emulator is low-rank (U, S, Vh); its dense weight is derived and cannot be written. Do not "
    "merge into the emulator, and do not use an init_lora_weights that rewrites the base weight (pissa, olora, loftq, "
    "corda, ...). Correct the adapter with `emloc-tools correct`, then merge it into the original model."
)


class DerivedWeight(torch.Tensor):
    """What `weight` of a low-rank layer gives: shape, dtype and device at no cost, the product when something reads it.

    Writing raises, into its views too: a plain temporary tensor would swallow the write without a trace.
    """

    _compute: Callable[[], torch.Tensor]
    _is_hf_initialized = True  # the initialisation of a parent module (GPT-2's c_proj) then leaves it alone

    @staticmethod
    def __new__(
        cls,
        compute: Callable[[], torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        strides: tuple[int, ...] | None = None,
    ) -> "DerivedWeight":
        weight = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=False
        )
        weight._compute = compute
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            weight = args[0]
            return cls(weight._compute, weight.shape, weight.dtype, weight.device, weight.stride())
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            if is_write and any(isinstance(one, cls) for one in values):
                raise RuntimeError(DERIVED)
        args, kwargs = tree_map(lambda value: value._compute() if isinstance(value, cls) else value, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map(cls._of_view, result) if func.is_view else result

    @classmethod
    def _of_view(cls, view: torch.Tensor) -> "DerivedWeight":
        return cls(lambda: view, tuple(view.shape), view.dtype, view.device, view.stride())

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise RuntimeError(DERIVED)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DerivedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class LowRankLayer(nn.Module):
    """`y = U (S * (Vh x)) + bias` with `U (out, k)`, `S (k,)`, `Vh (k, in)`: raw parameters, no child modules.

    PEFT's "all-linear" would adapt child Linears instead of this layer, under other keys than the base's.
    U and Vh are quantised the moment they are set if `four_bits` says so: while a model loads, one matrix at a time.
    """

    bias: Any  # a parameter `(out,)` or None
    four_bits: FourBits | None = None
    _is_hf_initialized = True  # transformers 5 would otherwise initialise `weight`

    def _setup(
        self, in_features: int, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None
    ) -> None:
        nn.Module.__init__(self)  # not the parent's, which would allocate the dense weight
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.U = nn.Parameter(torch.empty(out_features, rank, **options), requires_grad=False)
        self.S = nn.Parameter(torch.empty(rank, **options), requires_grad=False)
        self.Vh = nn.Parameter(torch.empty(rank, in_features, **options), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise RuntimeError(DERIVED)
        if self.four_bits and name in ("U", "Vh") and value.device.type != "meta" and not is_quantised(value):
            value = self.four_bits.quantised(value)
        super().__setattr__(name, value)

    def _shape(self, name: str) -> tuple[int, int]:
        return (self.out_features, self.rank) if name == "U" else (self.rank, self.in_features)

    def _factor(self, name: str) -> torch.Tensor:
        factor: Any = getattr(self, name)
        if not is_quantised(factor):
            return factor.detach()  # type: ignore[no-any-return]
        return dequantised(factor, factor.quant_state, self._shape(name))

    def _times(self, name: str, x: torch.Tensor) -> torch.Tensor:
        factor: Any = getattr(self, name)
        return Product.apply(x, factor, factor.quant_state, self._shape(name))  # type: ignore[no-any-return,no-untyped-call]

    def _dense(self) -> torch.Tensor:
        U, Vh = self._factor("U"), self._factor("Vh")
        return (U * self.S.detach().to(U.dtype)) @ Vh

    @property
    def _dtype(self) -> torch.dtype:
        """Of the weight, which a LoRA takes for its own."""
        state: Any = getattr(self.U, "quant_state", self.U)
        dtype: torch.dtype = state.dtype
        return dtype

    def reset_parameters(self) -> None:
        """Nothing to initialise: the factors come from the emulator's file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not U * S first: that would save one more activation for the backward pass.
        if self.four_bits is None:
            return F.linear(F.linear(x, self.Vh) * self.S, self.U, self.bias)
        low = self._times("Vh", x.to(self.four_bits.compute))
        # Who prepares a model for training in few bits turns what is not quantised, such as S, into float32.
        y = self._times("U", low * self.S.to(low.dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"


class LowRankLinear(LowRankLayer, nn.Linear):
    """In place of nn.Linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._setup(in_features, out_features, rank, bias, device, dtype)

    @property
    def weight(self) -> DerivedWeight:  # type: ignore[override]
        """The product `(out, in)`, computed when it is read."""
        return DerivedWeight(self._dense, (self.out_features, self.in_features), self._dtype, self.U.device)


class LowRankConv1D(LowRankLayer, Conv1D):  # type: ignore[misc]
    """In place of Conv1D, whose weight is `(in, out)`; U is still `(out, k)` and Vh `(k, in)`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._setup(in_features, out_features, rank, bias, device, dtype)
        self.nf, self.nx = out_features, in_features

    @property
    def weight(self) -> DerivedWeight:
        """The transposed product `(in, out)`, computed when it is read."""
        shape = (self.in_features, self.out_features)
        return DerivedWeight(lambda: self._dense().t().contiguous(), shape, self._dtype, self.U.device)
