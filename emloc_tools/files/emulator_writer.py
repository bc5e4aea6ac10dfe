"""Write an emulator folder: shards, configuration, modeling file, model card and manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.emulator import MANIFEST, QUANT_METHOD, STEMS, factor_names, factor_shapes
from emloc_tools.files.folders import write_json, write_text
from emloc_tools.files.manifest import (
    EmulatorManifest,
    EmulatorV1,
    EmulatorV2,
    EmulatorV3,
    EmulatorV4,
    EmulatorV5,
    FactoredStack,
    WeightingRecord,
    file_hash,
    manifest_dict,
)
from emloc_tools.files.tensors import ShardedWriter, TensorSpec
from emloc_tools.records import Library

CARD = """---
library_name: {library}
base_model: {base}
tags:
- emloc
- emulator
---

# EMLoC emulator of {base}

A light low-rank stand-in for **{base}** ({architecture}), made by emloc-tools {version}: {layers} are
held as `U diag(S) Vh`, {parameters:,} parameters instead of {base_parameters:,}. It is made for one thing: training a
LoRA in little memory. It is not a model to use by itself.

1. {loading}
2. Run `emloc-tools correct --emulator THIS_FOLDER --adapter YOUR_LORA --base {base} --output CORRECTED`.
3. Use the corrected LoRA with {base}.

Do not merge a LoRA into this emulator. {otherwise}
What it was made from is in `emulator.json`.
"""
LOADING: dict[Library, str] = {
    "transformers": "Load it with the Auto classes of transformers and `trust_remote_code=True`, and train a LoRA with "
    "any trainer.",
    "diffusers": "Load it with `{architecture}.from_pretrained` after `import emloc_tools`, or with `AutoModel` of\n"
    "   diffusers and `trust_remote_code=True`, and train a LoRA with any trainer.",
}
OTHERWISE: dict[Library, str] = {
    "transformers": "Without `trust_remote_code` loading fails with a shape error, which is intended.",
    "diffusers": "Otherwise loading fails with an unknown quantization type, which is intended.",
}


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

    `dense` are tensors taken over from the base; `factored` maps a layer to its `(out, in, rank)`, `stacks` those of
    experts to their `(experts, out, in, rank)`. The factors have `dtype`. `library` is the one that is to load the
    folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dense: Iterable[TensorSpec],
        factored: Mapping[str, tuple[int, int, int]],
        stacks: Mapping[str, tuple[int, int, int, int]] | None = None,
        dtype: torch.dtype,
        max_shard_size: int,
        library: Library = "transformers",
    ) -> None:
        self._folder, self._library = folder, library
        specs = list(dense)
        self._stacks = stacks = stacks or {}
        for name, shape in factored.items():
            shapes = zip(factor_names(name), factor_shapes(*shape), strict=True)
            specs += [TensorSpec(tensor, dtype, of) for tensor, of in shapes]
        for name, (experts, *shape_of_each) in stacks.items():
            stacked = factor_shapes(*shape_of_each, experts=experts)
            shapes = zip(factor_names(name, stack=True), stacked, strict=True)
            specs += [TensorSpec(tensor, dtype, of) for tensor, of in shapes]
        self.parameters = sum(torch.Size(spec.shape).numel() for spec in specs)
        # The guard: a weight of one element, on which any loader without our class fails. That of a stack of experts
        # has the name of the stack itself.
        self._guard = f"{min(factored)}.weight" if factored else min(stacks)
        specs.append(TensorSpec(self._guard, dtype, (1,)))
        self._dtype = dtype
        self.tensors = ShardedWriter(
            folder,
            STEMS[library],
            sorted(specs, key=lambda spec: _natural(spec.name)),
            max_shard_size=max_shard_size,
            metadata={"format": "pt"},
        )
        self.tensors.write(self._guard, torch.zeros(1, dtype=dtype))

    def write_dense(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of the base, as it is."""
        self.tensors.write(name, tensor)

    def write_factors(self, layer: str, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> None:
        """The factors of a layer or of a stack of experts, in any float dtype."""
        for name, tensor in zip(factor_names(layer, stack=layer in self._stacks), (U, S, Vh), strict=True):
            self.tensors.write(name, tensor.to(self._dtype))

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
        code: Mapping[str, bytes] | None = None,
    ) -> EmulatorManifest:
        """Write all other files. `base_config` is the base's config.json; `fields` are the manifest's other fields.

        `code` are the Python files of a base whose class is its own.

        The version is 5 with `code`, 4 for diffusers, 3 with `experts`, else 2 with a `weighting`, and 1 without.
        `class_name` is the emulator's own class, which diffusers has no use for. Raises `UnsupportedError` for a
        quantised base.
        """
        if base_config.get("quantization_config") is not None:
            raise UnsupportedError(
                "the base is quantised (quantization_config); make emulators of the original weights"
            )
        self.tensors.finish()
        fields = {**fields, "parameters": self.parameters, "tensors": dict(sorted(self.tensors.hashes.items()))}
        experts = fields.pop("experts", None)
        manifest: EmulatorManifest
        for name, data in (code or {}).items():
            (self._folder / name).write_bytes(data)
        if code:
            hashes = {name: file_hash(self._folder / name) for name in sorted(code)}
            more = {"code": hashes, "experts": experts or {}, "weighting": weighting}
            manifest = EmulatorV5.model_validate({**fields, **more})
        elif self._library == "diffusers":
            manifest = EmulatorV4.model_validate({**fields, "library": self._library, "weighting": weighting})
        elif experts:
            manifest = EmulatorV3.model_validate({**fields, "experts": experts, "weighting": weighting})
        elif weighting is None:
            manifest = EmulatorV1.model_validate(fields)
        else:
            manifest = EmulatorV2.model_validate({**fields, "weighting": weighting})
        ranks = {name: layer.rank for name, layer in manifest.layers.items()}
        ranks |= {name: stack.rank for name, stack in factored_stacks(manifest).items()}
        own = {"format_version": manifest.format_version, "ranks": ranks}
        # The base's own keys stay as they are: other versions of transformers write others.
        config = {key: value for key, value in base_config.items() if key != "quantization_config"}
        if self._library == "diffusers":
            config |= {"auto_map": dict(auto_map), "quantization_config": {"quant_method": QUANT_METHOD, **own}}
        else:
            config |= {"architectures": [class_name], "auto_map": dict(auto_map), "emloc": own}
        files = set(self.tensors.weight_map.values())
        if len(files) > 1:
            metadata = {"total_size": self.tensors.total_size}
            index = {"metadata": metadata, "weight_map": self.tensors.weight_map}
            write_json(self._folder / f"{STEMS[self._library]}.safetensors.index.json", index)
        write_json(self._folder / "config.json", config)
        write_text(self._folder / f"{modeling_file}.py", modeling)
        write_text(self._folder / "README.md", _card(manifest, self._library))
        write_json(self._folder / MANIFEST, manifest_dict(manifest))
        return manifest

    def close(self) -> None:
        """Close the shards; without `finish` they are incomplete."""
        self.tensors.close()


def _card(manifest: EmulatorManifest, library: Library) -> str:
    return CARD.format(
        library=library,
        loading=LOADING[library].format(architecture=manifest.base.architecture),
        otherwise=OTHERWISE[library],
        base=manifest.base.id,
        architecture=manifest.base.architecture,
        version=manifest.made_by.emloc_tools,
        layers=_factored(manifest),
        parameters=manifest.parameters,
        base_parameters=manifest.base_parameters,
    )


def factored_stacks(manifest: EmulatorManifest) -> dict[str, FactoredStack]:
    """The stacks of experts in a manifest of any version."""
    return manifest.experts if isinstance(manifest, (EmulatorV3, EmulatorV5)) else {}


def _factored(manifest: EmulatorManifest) -> str:
    layers, stacks = len(manifest.layers), factored_stacks(manifest)
    if not stacks:
        return f"{layers} linear layers"
    return f"{layers} linear layers and {sum(len(stack.experts) for stack in stacks.values())} matrices of experts"


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
