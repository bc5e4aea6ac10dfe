"""Makes of a model its emulator: puts low-rank layers in place of its own, and what their loading needs beside them.

This file is also pasted, as it is, into every emulator folder, after `lowrank_experts.py`. So it imports nothing but
torch and transformers, and works with transformers 4.56 and later.
"""

import re
from typing import Any

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from emloc_tools.models.four_bits import FourBits, four_bits_of, skipped
from emloc_tools.models.lowrank_experts import LowRankExperts
from emloc_tools.models.lowrank_layers import LowRankConv1D, LowRankLayer, LowRankLinear

FROZEN = (
    "the experts of an EMLoC emulator are frozen and take no LoRA. Adapt the attention, such as target_modules="
    "['q_proj', 'k_proj', 'v_proj', 'o_proj'], without target_parameters: PEFT makes them of 'all-linear' and of the "
    "names of the experts' projections for some models"
)


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


def _factor_stack(model: Any, path: str, rank: int, four_bits: FourBits | None) -> bool:
    """Replace a 3-D parameter of an experts module by factors; False if there is no such module."""
    parent, _, name = path.rpartition(".")
    module = dict(model.named_modules()).get(parent)
    weight = None if module is None else module._parameters.get(name)
    if module is None or weight is None or not hasattr(module, "_apply_gate"):
        return False
    if not isinstance(module, LowRankExperts):
        module.__class__ = type(f"LowRank{type(module).__name__}", (LowRankExperts, type(module)), {})
    module.factor(name, rank)
    if four_bits and not skipped(model, path):
        module.four_bits = four_bits
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
            (
                path
                for path in (name, alternative)
                if path not in modules and _factor_stack(model, path, rank, four_bits)
            ),
            None,
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
