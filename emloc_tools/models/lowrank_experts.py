"""Fused experts of transformers 5 with projections of low rank: one module of 3-D factors in place of 3-D weights.

This file is also pasted, as it is, into every emulator folder, after `lowrank_layers.py`. So it imports nothing but
torch.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from emloc_tools.models.four_bits import FourBits, Product, is_quantised, unstacked


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
    rows: Mapping[str, int] = MappingProxyType({})  # of each expert's U and Vh; packed numbers do not tell
    four_bits: FourBits | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        quantises = self.four_bits and name.endswith(("_U", "_Vh"))
        if quantises and value.device.type != "meta" and not is_quantised(value):
            value = self.four_bits.quantised(value)  # type: ignore[union-attr]
        super().__setattr__(name, value)

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
        self.rows = {**self.rows, f"{name}_U": out, f"{name}_Vh": rank}

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = (*args, *kwargs.values())  # some classes name them otherwise, and all take them in this order
        return experts_forward(self, self._project, *args)

    def _project(self, name: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        module: Any = self
        grouped = module.config._experts_implementation == "grouped_mm"
        if name in self.factored:
            y = self._times(f"{name}_Vh", x, routing, grouped)
            y = y * getattr(self, f"{name}_S")[routing.experts].to(y.dtype)
            y = self._times(f"{name}_U", y, routing, grouped)
        else:
            W = getattr(self, name)
            y = _by_expert(x, W.transpose(-2, -1) if module.is_transposed else W, routing, grouped)
        if module.has_bias:
            y = y + getattr(self, f"{name}_bias")[routing.experts]
        return y

    def _times(self, name: str, x: torch.Tensor, routing: Routing, grouped: bool) -> torch.Tensor:
        stack: Any = getattr(self, name)
        if not is_quantised(stack):
            return _by_expert(x, stack, routing, grouped)
        parts = torch.split(x.to(self.four_bits.compute), routing.counts)  # type: ignore[union-attr]
        packed = unstacked(stack, len(parts))
        into = x.shape[-1]
        out = self.rows[name]
        found = [
            Product.apply(parts[number], *packed[number], (out, into))  # type: ignore[no-untyped-call]
            for number, slots in enumerate(routing.counts)
            if slots
        ]
        return torch.cat(found).to(x.dtype) if found else x.new_zeros(0, out)

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
