"""Write an emulator folder: shards, configuration, modeling file, model card and manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.emulator import FACTORS, MANIFEST
from emloc_tools.files.folders import write_json, write_text
from emloc_tools.files.manifest import EmulatorManifest, EmulatorV1, EmulatorV2, WeightingRecord, manifest_dict
from emloc_tools.files.tensors import ShardedWriter, TensorSpec

CARD = """---
library_name: transformers
base_model: {base}
tags:
- emloc
- emulator
---

# EMLoC emulator of {base}

A light low-rank stand-in for **{base}** ({architecture}), made by emloc-tools {version}: {layers} linear layers are
held as `U diag(S) Vh`, {parameters:,} parameters instead of {base_parameters:,}. It is made for one thing: training a
LoRA in little memory. It is not a model to use by itself.

1. Load it with the Auto classes of transformers and `trust_remote_code=True`, and train a LoRA with any trainer.
2. Run `emloc-tools correct --emulator THIS_FOLDER --adapter YOUR_LORA --base {base} --output CORRECTED`.
3. Use the corrected LoRA with {base}.

Do not merge a LoRA into this emulator. Without `trust_remote_code` loading fails with a shape error, which is intended.
What it was made from is in `emulator.json`.
"""


@dataclass(frozen=True)
class WrittenEmulator:
    """A finished emulator folder. `nbytes` are those of its tensors.

    `left_dense` are chosen layers whose factors would not have been smaller.
    """

    folder: Path
    manifest: EmulatorManifest
    nbytes: int
    left_dense: tuple[str, ...] = ()


class EmulatorWriter:
    """Writes the tensors of an emulator in any order, then everything else.

    `dense` are tensors taken over from the base; `factored` maps a layer to its `(out, in, rank)`. The factors have
    `dtype`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dense: Iterable[TensorSpec],
        factored: Mapping[str, tuple[int, int, int]],
        dtype: torch.dtype,
        max_shard_size: int,
    ) -> None:
        self._folder = folder
        specs = list(dense)
        for name, (out_features, in_features, rank) in factored.items():
            shapes = ((out_features, rank), (rank,), (rank, in_features))
            specs += [
                TensorSpec(f"{name}.{factor}", dtype, shape) for factor, shape in zip(FACTORS, shapes, strict=True)
            ]
        self.parameters = sum(torch.Size(spec.shape).numel() for spec in specs)
        # The guard: a weight of one element, on which any loader without our class fails.
        self._guard = f"{min(factored)}.weight"
        specs.append(TensorSpec(self._guard, dtype, (1,)))
        self._dtype = dtype
        self.tensors = ShardedWriter(
            folder,
            "model",
            sorted(specs, key=lambda spec: _natural(spec.name)),
            max_shard_size=max_shard_size,
            metadata={"format": "pt"},
        )
        self.tensors.write(self._guard, torch.zeros(1, dtype=dtype))

    def write_dense(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of the base, as it is."""
        self.tensors.write(name, tensor)

    def write_factors(self, layer: str, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> None:
        """The factors of a layer, in any float dtype."""
        for factor, tensor in zip(FACTORS, (U, S, Vh), strict=True):
            self.tensors.write(f"{layer}.{factor}", tensor.to(self._dtype))

    def finish(
        self,
        *,
        base_config: Mapping[str, Any],
        class_name: str,
        auto_map: Mapping[str, str],
        modeling_file: str,
        modeling: str,
        fields: Mapping[str, Any],
        weighting: WeightingRecord | None = None,
    ) -> EmulatorManifest:
        """Write all other files. `base_config` is the base's config.json; `fields` are the manifest's other fields.

        The version is 2 with a `weighting`, and 1 without. Raises `UnsupportedError` for a quantised base.
        """
        if base_config.get("quantization_config") is not None:
            raise UnsupportedError(
                "the base is quantised (quantization_config); make emulators of the original weights"
            )
        self.tensors.finish()
        fields = {**fields, "parameters": self.parameters, "tensors": dict(sorted(self.tensors.hashes.items()))}
        manifest: EmulatorManifest
        if weighting is None:
            manifest = EmulatorV1.model_validate(fields)
        else:
            manifest = EmulatorV2.model_validate({**fields, "weighting": weighting})
        ranks = {name: layer.rank for name, layer in manifest.layers.items()}
        # The base's own keys stay as they are: other versions of transformers write others.
        config = {
            **{key: value for key, value in base_config.items() if key != "quantization_config"},
            "architectures": [class_name],
            "auto_map": dict(auto_map),
            "emloc": {"format_version": manifest.format_version, "ranks": ranks},
        }
        files = set(self.tensors.weight_map.values())
        if len(files) > 1:
            metadata = {"total_size": self.tensors.total_size}
            index = {"metadata": metadata, "weight_map": self.tensors.weight_map}
            write_json(self._folder / "model.safetensors.index.json", index)
        write_json(self._folder / "config.json", config)
        write_text(self._folder / f"{modeling_file}.py", modeling)
        write_text(self._folder / "README.md", _card(manifest))
        write_json(self._folder / MANIFEST, manifest_dict(manifest))
        return manifest

    def close(self) -> None:
        """Close the shards; without `finish` they are incomplete."""
        self.tensors.close()


def _card(manifest: EmulatorManifest) -> str:
    return CARD.format(
        base=manifest.base.id,
        architecture=manifest.base.architecture,
        version=manifest.made_by.emloc_tools,
        layers=len(manifest.layers),
        parameters=manifest.parameters,
        base_parameters=manifest.base_parameters,
    )


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
