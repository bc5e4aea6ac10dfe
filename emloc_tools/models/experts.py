"""Fused experts: which tensors are stacks of linear layers.

In transformers 5 the experts of a block are one module that holds a 3-D tensor per projection. Its arithmetic is
described by a few attributes (`is_transposed`, `has_bias`, `has_gate`, ...). Experts without these attributes (Llama 4,
DBRX) stay dense.
"""

from __future__ import annotations

from torch import nn

from emloc_tools.records import Layer

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
ATTRIBUTES = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


def stacks_of(name: str, module: nn.Module) -> list[Layer]:
    """The projections of an experts module called `name`, in the order of their use; none of any other module."""
    if not all(hasattr(module, attribute) for attribute in ATTRIBUTES):
        return []
    parameters = {key: module._parameters.get(key) for key in PROJECTIONS}
    found = []
    for key, weight in parameters.items():
        if weight is None or weight.dim() != 3:
            continue
        experts, rows, columns = weight.shape
        if module.is_transposed:
            found.append(Layer(f"{name}.{key}", columns, rows, "conv1d", bool(module.has_bias), experts))
        else:
            found.append(Layer(f"{name}.{key}", rows, columns, "linear", bool(module.has_bias), experts))
    return found


def module_of(model: nn.Module, stack: Layer) -> nn.Module:
    """The experts module that holds a stack."""
    return model.get_submodule(stack.name.rpartition(".")[0])
