"""Low-rank layers that stand in for nn.Linear and GPT-2's Conv1D, such that PEFT treats them as those.

This file is also pasted, as it is, into every emulator folder, after `four_bits.py`. So it imports nothing but torch
and transformers, and works with transformers 4.56 and later.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from emloc_tools.models.four_bits import FourBits, Product, dequantised, four_bits_of, is_quantised, skipped

DERIVED = (
    "this layer of an EMLoC emulator is low-rank (U, S, Vh); its dense weight is derived and cannot be written. Do not "
    "merge into the emulator, and do not use an init_lora_weights that rewrites the base weight (pissa, olora, loftq, "
    "corda, ...). Correct the adapter with `emloc-tools correct`, then merge it into the original model."
)
FROZEN = (
    "the experts of an EMLoC emulator are frozen and take no LoRA. Adapt the attention, such as target_modules="
    "['q_proj', 'k_proj', 'v_proj', 'o_proj'], without target_parameters: PEFT makes them of 'all-linear' and of the "
    "names of the experts' projections for some models"
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


class Routing(NamedTuple):
    """Which rows of an experts module's input `(rows, in)` go where: one slot per row and expert, sorted by expert.

    `tokens (slots,)` are the rows, `experts (slots,)` their experts; `counts` says how many slots each expert has.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    counts: list[int]
    rows: int


def experts_forward(
    module: Any,
    project: Callable[[str, torch.Tensor, Routing], torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What a module of fused experts of transformers 5 computes, with its projections left to `project`.

    `project(name, x (slots, in), routing)` gives `(slots, out)`, bias included. An index beyond the experts means none.
    """
    top_k = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(experts, minlength=module.num_experts)[: module.num_experts].tolist()
    slots = sum(counts)
    order = order[:slots]
    routing = Routing(order // top_k, experts[:slots], counts, hidden_states.shape[0])
    x = hidden_states[routing.tokens]
    y = project("gate_up_proj" if module.has_gate else "up_proj", x, routing)
    y = project("down_proj", module._apply_gate(y) if module.has_gate else module.act_fn(y), routing)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order][:, None]
    # Summed per row in a fixed order, as index_add_ on GPUs is not.
    placed = y.new_zeros(top_k_index.numel(), y.shape[-1]).index_copy(0, order, y)
    return placed.view(-1, top_k, y.shape[-1]).sum(dim=1).to(hidden_states.dtype)


class LowRankExperts(nn.Module):
    """Mixed into an experts class: some projections are `y = U[e] (S[e] * (Vh[e] x))` of E experts.

    In place of a parameter `<name>` they hold `<name>_U (E, out, k)`, `<name>_S (E, k)` and `<name>_Vh (E, k, in)`:
    parameters of this module and no modules, since PEFT would take a module called `down_proj` for a target.

    Runs by grouped products where the model's experts implementation is `grouped_mm` and shapes and dtype allow it, and
    expert by expert otherwise.
    """

    _is_hf_initialized = True  # transformers would initialise the 3-D parameters
    factored: tuple[str, ...] = ()

    def factor(self, name: str, rank: int) -> None:
        """Replace the 3-D parameter `name` by factors."""
        module: Any = self
        weight = module._parameters.pop(name)
        experts, rows, columns = weight.shape
        out, into = (columns, rows) if module.is_transposed else (rows, columns)
        shapes = {"U": (experts, out, rank), "S": (experts, rank), "Vh": (experts, rank, into)}
        for factor, shape in shapes.items():
            empty = torch.empty(shape, device=weight.device, dtype=weight.dtype)
            self.register_parameter(f"{name}_{factor}", nn.Parameter(empty, requires_grad=False))
        self.factored = (*self.factored, name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = (*args, *kwargs.values())  # some classes name them otherwise, and all take them in this order
        return experts_forward(self, self._project, *args)

    def _project(self, name: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        module: Any = self
        grouped = module.config._experts_implementation == "grouped_mm"
        if name in self.factored:
            U, S, Vh = (getattr(self, f"{name}_{factor}") for factor in ("U", "S", "Vh"))
            y = _by_expert(_by_expert(x, Vh, routing, grouped) * S[routing.experts], U, routing, grouped)
        else:
            W = getattr(self, name)
            y = _by_expert(x, W.transpose(-2, -1) if module.is_transposed else W, routing, grouped)
        if module.has_bias:
            y = y + getattr(self, f"{name}_bias")[routing.experts]
        return y

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank {getattr(self, f'{name}_S').shape[-1]}" for name in self.factored)


def _by_expert(x: torch.Tensor, W: torch.Tensor, routing: Routing, grouped: bool) -> torch.Tensor:
    """`W[e] x` for `x (slots, in)` sorted by expert and `W (E, out, in)`."""
    if grouped and hasattr(F, "grouped_mm") and W.dtype == torch.bfloat16:
        ends = torch.tensor(routing.counts, dtype=torch.int32, device=x.device).cumsum(0, dtype=torch.int32)
        # The kernel wants rows of a multiple of 16 bytes.
        if all(size * W.element_size() % 16 == 0 for size in W.shape[1:]):
            product: torch.Tensor = F.grouped_mm(x.to(W.dtype), W.transpose(-2, -1), offs=ends)
            return product
    parts = torch.split(x, routing.counts)
    found = [F.linear(parts[number], W[number]) for number, slots in enumerate(routing.counts) if slots]
    return torch.cat(found) if found else x.new_zeros(0, W.shape[1])


def require_transformers_5() -> None:
    """For emulators with fused experts, which earlier versions hold one by one and would leave random here."""
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(
            "this emulator holds its experts as transformers 5 does, and this is transformers "
            f"{transformers.__version__}; update transformers to load it"
        )


class RefusesExperts:
    """Mixed into the model class of an emulator with factored experts: a LoRA on these would train nothing.

    PEFT's `target_parameters` would match none of them, and be passed over with a warning at most.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_config":  # PEFT leaves its configurations here, after it has put its layers in
            experts = {path: part for path, part in self.named_modules() if isinstance(part, LowRankExperts)}  # type: ignore[attr-defined]
            stacks = [f"{path}.{name}" for path, part in experts.items() for name in part.factored]
            for config in value.values():
                for target in getattr(config, "target_parameters", None) or ():
                    if any(f".{path}".endswith(f".{target}") for path in stacks):
                        raise ValueError(f"target_parameters names {target}: {FROZEN}")
        super().__setattr__(name, value)


class InitialisedAsItsBase:
    """Mixed into the emulator of a class of transformers, which fills what no file holds as it does for that class.

    For code from elsewhere transformers 5 passes over modules without tensors of their own. But some of these fill
    buffers of others, and Falcon-H1 would compute with whatever was in memory.
    """

    def initialize_weights(self) -> None:
        """What `from_pretrained` calls."""
        self.is_custom_code = lambda: False
        try:
            super().initialize_weights()  # type: ignore[misc]
        finally:
            del self.is_custom_code


class LoadsWholly:
    """Mixed into the emulator of the base's own class: whatever the files do not hold would be random.

    That is so where another version of transformers calls a part of the model otherwise, as 4 does with LLaVA's vision
    tower, and is no more than a warning there.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As ever, but with an error in place of random weights."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{len(missing)} tensors, such as {missing[0]}, are not in this emulator and would be random: it is "
                f"for another version of transformers than {transformers.__version__}, or damaged"
            )
        return (model, info) if output_loading_info else model


def _factor_stack(model: Any, path: str, rank: int) -> bool:
    """Replace a 3-D parameter of an experts module by factors; False if there is no such module."""
    parent, _, name = path.rpartition(".")
    module = dict(model.named_modules()).get(parent)
    weight = None if module is None else module._parameters.get(name)
    if module is None or weight is None or not hasattr(module, "_apply_gate"):
        return False
    if not isinstance(module, LowRankExperts):
        module.__class__ = type(f"LowRank{type(module).__name__}", (LowRankExperts, type(module)), {})
    module.factor(name, rank)
    return True


def factor_layers(model: Any, ranks: dict[str, int]) -> Any:
    """Replace, in place, every module and every stack of experts that `ranks` names, and return the model.

    A class without a head names modules without its prefix. Raises ValueError if a module under the prefix, or every
    module, is absent: its factors would be dropped and its dense weight left random.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    modules = dict(model.named_modules())
    factored: list[str] = []
    guarded: list[str] = []
    four_bits = four_bits_of(model)
    for name, rank in ranks.items():
        alternative = name[len(prefix) :] if name.startswith(prefix) else prefix + name
        path = next((path for path in (name, alternative) if path in modules), None)
        stack = next(
            (path for path in (name, alternative) if path not in modules and _factor_stack(model, path, rank)), None
        )
        if stack is not None:
            guarded += [stack, name]
            continue
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
            if four_bits:
                raise ValueError(f"{path} is a Conv1D, in whose place transformers puts its own layer of 4 bits")
            new = LowRankConv1D(old.weight.shape[0], old.weight.shape[1], rank, **options)
        else:
            new = LowRankLinear(old.in_features, old.out_features, rank, **options)
        new.train(old.training)
        if four_bits and not skipped(model, path):
            new.four_bits = four_bits
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, new)
        factored += [path, name]
    guarded += [f"{path}.weight" for path in factored]
    if not guarded:
        raise ValueError(f"{type(model).__name__} has none of this emulator's layers, such as {next(iter(ranks))}")
    # One weight of one element makes every load without this code fail on its shape. With it, it is ignored.
    guards = [f"^{re.escape(path)}$" for path in dict.fromkeys(guarded)]
    # Early releases of transformers 5 take a list as those of 4 do, later ones a set.
    annotations = transformers.PreTrainedModel.__annotations__
    kind = set if "set" in str(annotations.get("_keys_to_ignore_on_load_unexpected")) else list
    model._keys_to_ignore_on_load_unexpected = kind([*(model._keys_to_ignore_on_load_unexpected or ()), *guards])
    return model
