"""LoRAs in the file that pipelines of diffusers save and load: one component's pairs, and whatever else is in it.

The configuration that PEFT keeps in a file of its own is in the header of the weights, or is left out: then ranks are
those of the tensors, and alphas, where no tensor gives them, are equal to the ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from emloc_tools.errors import FormatError
from emloc_tools.files.adapter import CONFIG, Adapter
from emloc_tools.files.json_files import parse_object
from emloc_tools.files.opening import file_inside
from emloc_tools.files.tensors import TensorFolder

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # key in the header, whose value is JSON
PAIR = re.compile(r"((?:transformer|unet)(?:_\d+)?)\.(.+)\.lora_[AB]\.weight")
OTHER_NAMES = re.compile(r"\.lora_(down|up)\.|\.lora\.(down|up)\.|^lora_unet_|\.processor\.")


class DiffusersLora(Adapter):
    """A folder with a LoRA of diffusers. Text encoders' pairs in it are among `other_tensors`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_path = self.weights_path = folder / WEIGHTS
        self.tensors = TensorFolder.of_files([file_inside(folder, WEIGHTS, "A17")], rule="A17")
        try:
            self._metadata = self._read_metadata()
            self.component = self._find_component()
            self.prefix = f"{self.component}."
            self.config = self._find_config()
        except BaseException:
            self.tensors.close()
            raise
        self._check()

    @property
    def other_tensors(self) -> list[str]:
        """Tensors that belong to no pair of the component: those of other components. Alphas belong to their pairs."""
        alphas = {f"{self.prefix}{module}.alpha" for module in self.loras}
        return [name for name in super().other_tensors if name not in alphas]

    def metadata_with(self, config: Mapping[str, Any]) -> dict[str, str]:
        """The header's metadata with another configuration of the component, empty if there was none."""
        if self._metadata is None:
            return {}
        others = {key: value for key, value in self._metadata.items() if not key.startswith(self.prefix)}
        values = others | {self.prefix + key: value for key, value in config.items()}
        return {METADATA: json.dumps(values, indent=2, sort_keys=True)}

    def _read_metadata(self) -> dict[str, Any] | None:
        text = self.tensors.metadata_of(WEIGHTS).get(METADATA)
        if text is None:
            return None
        try:
            return parse_object(text.encode("utf-8", "surrogatepass"))
        except ValueError as error:
            raise FormatError("A17", self.weights_path, METADATA, f"is not strict JSON: {error}") from error

    def _find_component(self) -> str:
        components = sorted({match[1] for name in self.tensors.names() if (match := PAIR.fullmatch(name))})
        if not components:
            message = "holds no lora_A/lora_B pair of a transformer or a unet"
            if any(OTHER_NAMES.search(name) for name in self.tensors.names()):
                message += (
                    ", but pairs under other names; load it into a pipeline of diffusers and save it from there "
                    "(save_lora_weights of get_peft_model_state_dict)"
                )
            raise FormatError("A18", self.weights_path, "", message)
        if len(components) > 1:
            message = f"holds pairs of {' and '.join(components)}; save them one by one"
            raise FormatError("A18", self.weights_path, "", message)
        return components[0]

    def _find_config(self) -> dict[str, Any]:
        """The component's part of the metadata; without metadata, what the tensors tell of the kind of LoRA."""
        alphas = [name for name in self.tensors.names() if name.endswith(".alpha")]
        if self._metadata is None:
            own = [name for name in self.tensors.names() if name.startswith(self.prefix)]
            return {
                "peft_type": "LORA",
                "use_dora": any("lora_magnitude_vector" in name or "dora_scale" in name for name in own),
                "lora_bias": any(name.endswith(".lora_B.bias") for name in own),
            }
        if alphas:
            raise FormatError(
                "A19", self.weights_path, alphas[0], f"is there beside {METADATA}, which gives alphas too"
            )
        return {
            key.removeprefix(self.prefix): value for key, value in self._metadata.items() if key.startswith(self.prefix)
        }

    def _value(self, module: str, key: str, pattern_key: str) -> float:
        if self._metadata is not None:
            return super()._value(module, key, pattern_key)
        shape = self.tensors.spec(f"{self.prefix}{module}.lora_B.weight").shape
        rank = shape[1] if len(shape) == 2 else 0
        name = f"{self.prefix}{module}.alpha"
        if key == "r" or name not in self.tensors:
            return rank
        spec = self.tensors.spec(name)
        alpha = float(self.tensors.read(name).double()) if spec.nbytes == spec.dtype.itemsize else 0.0
        if not spec.dtype.is_floating_point or not 0 < alpha < torch.inf:
            raise FormatError("A19", self.weights_path, name, "must be one number of floating point above 0")
        return alpha


def open_adapter(folder: Path) -> Adapter:
    """The adapter in a folder, PEFT's or that of diffusers."""
    if not (folder / CONFIG).exists() and (folder / WEIGHTS).exists():
        return DiffusersLora(folder)
    return Adapter(folder)
