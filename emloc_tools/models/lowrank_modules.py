"""Low-rank layers that stand in for nn.Linear and GPT-2's Conv1D, such that PEFT treats them as those.

This file is also pasted, as it is, into every emulator folder. So it imports nothing but torch and transformers,
and works with transformers 4.56 and later.
"""

import re

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

DERIVED = (
    "this layer of an EMLoC emulator is low-rank (U, S, Vh); its dense weight is derived and cannot be written. Do not "
    "merge into the emulator, and do not use an init_lora_weights that rewrites the base weight (pissa, olora, loftq, "
    "corda, ...). Correct the adapter with `emloc-tools correct`, then merge it into the original model."
)


class DerivedWeight(torch.Tensor):
    """What `weight` of a low-rank layer gives: shape, dtype and device at no cost, the product when something reads it.

    Writing raises: a plain temporary tensor would swallow the write without a trace.
    """

    _is_hf_initialized = True  # the initialisation of a parent module (GPT-2's c_proj) then leaves it alone

    @staticmethod
    def __new__(cls, U, S, Vh, transposed):
        shape = (Vh.shape[1], U.shape[0]) if transposed else (U.shape[0], Vh.shape[1])
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=U.dtype, device=U.device, requires_grad=False)
        weight._factors = (U.detach(), S.detach(), Vh.detach(), transposed)
        return weight

    def dense(self):
        """The product U diag(S) Vh, transposed for a Conv1D."""
        U, S, Vh, transposed = self._factors
        W = (U * S) @ Vh
        return W.t() if transposed else W

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return DerivedWeight(*args[0]._factors)
        if func._schema.is_mutable and isinstance(args[0], DerivedWeight):
            raise RuntimeError(DERIVED)
        args, kwargs = torch.utils._pytree.tree_map(
            lambda value: value.dense() if isinstance(value, DerivedWeight) else value, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        raise RuntimeError(DERIVED)

    def __repr__(self):
        return f"DerivedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class LowRankLayer:
    """`y = U (S * (Vh x)) + bias` with `U (out, k)`, `S (k,)`, `Vh (k, in)`: raw parameters, no child modules.

    PEFT's "all-linear" would adapt child Linears instead of this layer, under other keys than the base's.
    """

    _is_hf_initialized = True  # transformers 5 would otherwise initialise `weight`

    def _setup(self, in_features, out_features, rank, bias, device, dtype):
        nn.Module.__init__(self)
        options = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.U = nn.Parameter(torch.empty(out_features, rank, **options), requires_grad=False)
        self.S = nn.Parameter(torch.empty(rank, **options), requires_grad=False)
        self.Vh = nn.Parameter(torch.empty(rank, in_features, **options), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)

    def __setattr__(self, name, value):
        if name == "weight":
            raise RuntimeError(DERIVED)
        super().__setattr__(name, value)

    def reset_parameters(self):
        """Nothing to initialise: the factors come from the emulator's file."""

    def forward(self, x):
        # Not U * S first: that would save one more activation for the backward pass.
        return F.linear(F.linear(x, self.Vh) * self.S, self.U, self.bias)

    def extra_repr(self):
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"


class LowRankLinear(LowRankLayer, nn.Linear):
    """In place of nn.Linear."""

    def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
        self._setup(in_features, out_features, rank, bias, device, dtype)

    @property
    def weight(self):
        return DerivedWeight(self.U, self.S, self.Vh, False)


class LowRankConv1D(LowRankLayer, Conv1D):
    """In place of Conv1D, whose weight is `(in, out)`; U is still `(out, k)` and Vh `(k, in)`."""

    def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
        self._setup(in_features, out_features, rank, bias, device, dtype)
        self.nf, self.nx = out_features, in_features

    @property
    def weight(self):
        return DerivedWeight(self.U, self.S, self.Vh, True)


def factor_layers(model, ranks):
    """Replace, in place, every module that `ranks` names. A class without a head names them without its prefix."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    modules = dict(model.named_modules())
    factored = []
    for name, rank in ranks.items():
        alternative = name[len(prefix) :] if name.startswith(prefix) else prefix + name
        path = next((path for path in (name, alternative) if path in modules), None)
        if path is None or isinstance(modules[path], LowRankLayer):
            continue
        old = modules[path]
        options = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
        if isinstance(old, Conv1D):
            new = LowRankConv1D(old.weight.shape[0], old.weight.shape[1], rank, **options)
        elif isinstance(old, nn.Linear):
            new = LowRankLinear(old.in_features, old.out_features, rank, **options)
        else:
            raise TypeError(
                f"{path} is a {type(old).__name__}; this emulator was made for another version of its model class"
            )
        new.train(old.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, new)
        factored.append(path)
    if not factored:
        raise ValueError(f"{type(model).__name__} has none of this emulator's layers, such as {next(iter(ranks))}")
    # One `weight` of one element makes every load without this code fail on its shape. With it, it is ignored.
    guards = [f"^{re.escape(path)}\\.weight$" for path in factored]
    kind = set if int(transformers.__version__.split(".")[0]) >= 5 else list
    model._keys_to_ignore_on_load_unexpected = kind([*(model._keys_to_ignore_on_load_unexpected or ()), *guards])
    return model
