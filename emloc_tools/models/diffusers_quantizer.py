"""What makes diffusers load emulators: a `quant_method` by which any of its model classes gets the low-rank layers.

This file is also pasted, as it is, into every emulator of a model of diffusers, after `lowrank_modules.py`.
"""

import enum
from collections.abc import Mapping
from typing import Any

from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from emloc_tools.models.lowrank_modules import factor_layers


class EmlocMethod(str, enum.Enum):
    """diffusers asks the name of a method for its `value`."""

    EMLOC = "emloc"


class EmlocConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of an emulator: the rank of every factored layer by module name."""

    def __init__(self, ranks: Mapping[str, int], format_version: int, quant_method: str = "emloc") -> None:
        self.quant_method = EmlocMethod(quant_method)
        self.format_version, self.ranks = format_version, dict(ranks)

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        ranks = dict(self.ranks)
        return {"quant_method": self.quant_method.value, "format_version": self.format_version, "ranks": ranks}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from a default, which there is none of."""
        return self.to_dict()


class EmlocQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Puts low-rank layers into a model before its weights are loaded. Nothing is quantised: all stays as it is."""

    requires_calibration = True  # diffusers cannot make an emulator of a model while it loads that
    use_keep_in_fp32_modules = True

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Refuse a checkpoint without the factors, and leave out the guard, of which nobody needs to be told."""
        ranks = self.quantization_config.ranks
        found = set(loaded_keys)
        absent = [key for name in ranks for key in (f"{name}.U", f"{name}.S", f"{name}.Vh") if key not in found]
        if absent:
            raise ValueError(f"{absent[0]} is not in {checkpoint_files[0]}; the emulator is damaged")
        return [key for key in loaded_keys if key.removesuffix(".weight") not in ranks]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        factor_layers(model, self.quantization_config.ranks)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.is_quantized = False  # else diffusers would refuse to cast it to another dtype
        for name in self.quantization_config.ranks:
            layer = model.get_submodule(name)
            layer.register_state_dict_post_hook(_with_guard)
            layer.register_load_state_dict_pre_hook(_without_guard)
        return model

    @property
    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True


def _with_guard(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The guard that is in the emulator's file. Pipelines that load a LoRA look for a weight of each layer by name."""
    state[f"{prefix}weight"] = layer.S.new_zeros(1)


def _without_guard(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}weight", None)


def register() -> None:
    """Make the model classes of diffusers load emulators."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["emloc"] = EmlocConfig
    auto.AUTO_QUANTIZER_MAPPING["emloc"] = EmlocQuantizer
