"""Low-rank layers that stand in for nn.Linear and GPT-2's Conv1D, such that PEFT treats them as those.

This file is also pasted, as it is, into every emulator folder. So it imports nothing but torch and transformers,
and works with transformers 4.56 and later.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

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
    """

    bias: Any  # a parameter `(out,)` or None
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
        super().__setattr__(name, value)

    def _dense(self) -> torch.Tensor:
        return (self.U.detach() * self.S.detach()) @ self.Vh.detach()

    def reset_parameters(self) -> None:
        """Nothing to initialise: the factors come from the emulator's file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not U * S first: that would save one more activation for the backward pass.
        return F.linear(F.linear(x, self.Vh) * self.S, self.U, self.bias)

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
        return DerivedWeight(self._dense, (self.out_features, self.in_features), self.U.dtype, self.U.device)


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
        return DerivedWeight(lambda: self._dense().t().contiguous(), shape, self.U.dtype, self.U.device)


def factor_layers(model: Any, ranks: dict[str, int]) -> Any:
    """Replace, in place, every module that `ranks` names, and return the model.

    A class without a head names modules without its prefix. Raises ValueError if a module under the prefix, or every
    module, is absent: its factors would be dropped and its dense weight left random.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    modules = dict(model.named_modules())
    factored = []
    for name, rank in ranks.items():
        alternative = name[len(prefix) :] if name.startswith(prefix) else prefix + name
        path = next((path for path in (name, alternative) if path in modules), None)
        if path is None and name.startswith(prefix):
            raise ValueError(
                f"{type(model).__name__} has no {name}; this emulator was made for another model class or version"
            )
        if path is None or isinstance(modules[path], LowRankLayer):
            continue
        old = modules[path]
        if not isinstance(old, (nn.Linear, Conv1D)):
            raise TypeError(
                f"{path} is a {type(old).__name__}; this emulator was made for another version of its model class"
            )
        options: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
        new: LowRankLayer
        if isinstance(old, Conv1D):
            new = LowRankConv1D(old.weight.shape[0], old.weight.shape[1], rank, **options)
        else:
            new = LowRankLinear(old.in_features, old.out_features, rank, **options)
        new.train(old.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, new)
        factored += [path, name]
    if not factored:
        raise ValueError(f"{type(model).__name__} has none of this emulator's layers, such as {next(iter(ranks))}")
    # One `weight` of one element makes every load without this code fail on its shape. With it, it is ignored.
    guards = [f"^{re.escape(path)}\\.weight$" for path in dict.fromkeys(factored)]
    kind = set if int(transformers.__version__.split(".")[0]) >= 5 else list
    model._keys_to_ignore_on_load_unexpected = kind([*(model._keys_to_ignore_on_load_unexpected or ()), *guards])
    return model
