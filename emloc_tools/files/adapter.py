"""PEFT LoRA adapters (`formats/adapter/SPEC.md`): pairs, scalings, everything else untouched; and corrected ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from emloc_tools.errors import FormatError, UnsupportedError
from emloc_tools.files.folders import write_json
from emloc_tools.files.manifest import AdapterManifest, manifest_dict, read_manifest
from emloc_tools.files.tensors import ShardedWriter, TensorFolder, TensorSpec, content_hash, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "emloc.json"
PREFIX = "base_model.model."
MARK = "emloc"  # key in the safetensors header of a corrected adapter


@dataclass(frozen=True)
class LoraKeys:
    """Where the pair of one module is stored, and its scaling `s` and rank."""

    A: str
    B: str
    scaling: float
    rank: int


class Adapter:
    """A PEFT LoRA adapter folder. Opening checks the configuration, pairs and shapes; reading checks values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_path, self.weights_path = folder / CONFIG, folder / WEIGHTS
        if folder.is_dir() and not self.weights_path.exists() and (folder / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{folder} holds a pickled adapter_model.bin, which is never opened; save it again as safetensors"
            )
        self.config = read_json(self.config_path, "A1")
        if self.config.get("peft_type") != "LORA":
            message = f"is {self.config.get('peft_type')!r}; only LORA adapters can be used"
            raise FormatError("A2", self.config_path, "peft_type", message)
        self.tensors = TensorFolder.of_files([self.weights_path], rule="A3")
        self.loras = {module: self._keys(module) for module in self._modules()}
        self.manifest = self._read_corrected()

    @property
    def corrected(self) -> bool:
        """Whether emloc-tools already corrected this adapter."""
        return self.manifest is not None

    @property
    def hash(self) -> str:
        """Identity of the adapter: a hash over the content hashes of its tensors."""
        digest = xxhash.xxh3_128()
        for name in self.tensors.names():
            digest.update(f"{name} {content_hash(self.tensors.read(name))}\n".encode())
        return f"xxh3_128:{digest.hexdigest()}"

    @property
    def other_tensors(self) -> list[str]:
        """Tensors that belong to no LoRA pair, such as those of `modules_to_save`."""
        paired = {key for lora in self.loras.values() for key in (lora.A, lora.B)}
        return [name for name in self.tensors.names() if name not in paired]

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A (r, in)` and `B (out, r)` of a module in the stored dtype; NaN or infinity is a `FormatError`."""
        keys = self.loras[module]
        return self.read(keys.A), self.read(keys.B)

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its stored name; NaN or infinity is a `FormatError`."""
        tensor = self.tensors.read(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FormatError("A5", self.weights_path, name, "holds NaN or infinity; the training diverged")
        return tensor

    def close(self) -> None:
        """Release the file."""
        self.tensors.close()

    def _modules(self) -> list[str]:
        modules = set()
        for name in self.tensors.names():
            match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight", name)
            if match:
                modules.add(match[1])
        if not modules:
            raise FormatError("A4", self.weights_path, "", "holds no lora_A/lora_B pair of any linear layer")
        return sorted(modules)

    def _keys(self, module: str) -> LoraKeys:
        A, B = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
        for key in (A, B):
            if key not in self.tensors:
                raise FormatError("A4", self.weights_path, key, "is missing although its partner is there")
        rank, alpha = (
            self._value(module, "r", "rank_pattern"),
            self._value(module, "lora_alpha", "alpha_pattern"),
        )
        shape_A, shape_B = self.tensors.spec(A).shape, self.tensors.spec(B).shape
        if len(shape_A) != 2 or len(shape_B) != 2 or not shape_A[0] == shape_B[1] == rank:
            message = f"has shapes A {list(shape_A)} and B {list(shape_B)}; the configuration says rank {rank:g}"
            raise FormatError("A4", self.weights_path, module, message)
        scaling = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        return LoraKeys(A, B, scaling, int(rank))

    def _value(self, module: str, key: str, pattern_key: str) -> float:
        """r or lora_alpha of a module: the first pattern that matches the end of its name, else the default."""
        patterns = self.config.get(pattern_key) or {}
        value = self.config.get(key)
        if isinstance(patterns, dict):
            for pattern, special in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    value = special
                    break
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(patterns, dict) or not number or not 0 < value < math.inf:
            raise FormatError("A6", self.config_path, key, f"must be a positive number for {module}, found {value!r}")
        return float(value)

    def _read_corrected(self) -> AdapterManifest | None:
        path = self.folder / MANIFEST
        marked = MARK in self.tensors.metadata_of(self.weights_path.name)
        if not path.exists():
            if marked:
                raise FormatError("A10", self.weights_path, MARK, f"marks a corrected adapter, but {MANIFEST} is gone")
            return None
        manifest = read_manifest(path, AdapterManifest, rules=("A7", "A8", "A9"))
        if not marked:
            raise FormatError("A10", path, "", "describes a corrected adapter, but the weights carry no mark of it")
        for name in sorted(set(manifest.tensors) | set(self.tensors.names())):
            if name not in self.tensors or content_hash(self.tensors.read(name)) != manifest.tensors.get(name):
                raise FormatError("A10", path, f"tensors.{name}", "is not what was written; the weights were changed")
        return manifest


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    fields: Mapping[str, Any],
) -> AdapterManifest:
    """Write a corrected adapter: PEFT's two files and `emloc.json`. `fields` are the manifest's other fields."""
    specs = [TensorSpec(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)]
    mark = json.dumps({"corrected": True, "format_version": 1}, sort_keys=True)
    metadata = {"format": "pt", MARK: mark}
    writer = ShardedWriter(folder, "adapter_model", specs, max_shard_size=1 << 62, metadata=metadata)
    try:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])
        writer.finish()
    finally:
        writer.close()
    manifest = AdapterManifest.model_validate({**fields, "tensors": writer.hashes})
    write_json(folder / CONFIG, config)
    write_json(folder / MANIFEST, manifest_dict(manifest))
    return manifest
