"""Which tensors PEFT makes on a model for an adapter's configuration, without a weight in memory.

Keys that PEFT does not expect are dropped when it loads an adapter, and those that it misses stay at their start; of
the first it says nothing. So the installed PEFT itself is asked, on a model whose parameters are on meta.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.models.source import first_line

# What only the start of a training reads; with the weights on meta, most of it could not be computed.
INITIAL = ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "kasa_config")


@dataclasses.dataclass(frozen=True)
class PeftKeys:
    """The tensors of the model with the adapter in it, without PEFT's prefix and the adapter's name.

    `adapter` are those that belong to the adapter, `model` all, by name with their shapes.
    """

    adapter: dict[str, tuple[int, ...]]
    model: dict[str, tuple[int, ...]]


def expected_keys(model: nn.Module, config: Mapping[str, Any]) -> PeftKeys:
    """The keys that PEFT makes on `model`, which is left as it is, for the fields of an `adapter_config.json`.

    Raises `MismatchError` if the configuration means no module of the model, `UnsupportedError` if the installed PEFT
    cannot build it.
    """
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - {*INITIAL, "peft_type"}
    fields = {name: value for name, value in config.items() if name in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            settings = LoraConfig(**fields, init_lora_weights=False)
            adapted: Any = inject_adapter_in_model(settings, copy.deepcopy(model), low_cpu_mem_usage=True)
        except ValueError as error:
            raise MismatchError(f"PEFT cannot put the adapter on the model: {first_line(error)}") from error
        except (TypeError, AttributeError, KeyError, RuntimeError, ImportError, re.error) as error:
            raise UnsupportedError(
                f"the installed PEFT cannot build an adapter by this configuration: {first_line(error)}"
            ) from error
        tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return PeftKeys(own, {name: tuple(tensor.shape) for name, tensor in adapted.state_dict().items()})
