"""Write corrected adapters: files of PEFT or diffusers, with a mark in the weights, and `emloc.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.adapter import CONFIG, MANIFEST, MARK, WEIGHTS, Adapter, mark_of
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_WEIGHTS
from emloc_tools.files.diffusers_lora import DiffusersLora
from emloc_tools.files.folders import write_json
from emloc_tools.files.manifest import (
    AdapterManifest,
    AdapterV1,
    AdapterV2,
    AdapterV3,
    AdapterV4,
    BaseRecord,
    MadeBy,
    Refinement,
    Selection,
    manifest_dict,
)
from emloc_tools.files.tensors import ShardedWriter, TensorSpec


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    fields: Mapping[str, Any],
    selection: Selection | None = None,
) -> AdapterManifest:
    """Write a corrected adapter: PEFT's two files and `emloc.json`. `fields` are the manifest's other fields.

    The version is 2 with a `selection`, else 1.
    """
    model: type[AdapterV1 | AdapterV2] = AdapterV1 if selection is None else AdapterV2
    hashes = _write_weights(folder, WEIGHTS, tensors, model, {})
    chosen = {} if selection is None else {"selection": selection}
    manifest = model.model_validate({**fields, "tensors": hashes, **chosen})
    write_json(folder / CONFIG, config)
    write_json(folder / MANIFEST, manifest_dict(manifest))
    return manifest


def write_diffusers_lora(
    folder: Path,
    trained: DiffusersLora,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    fields: Mapping[str, Any],
) -> AdapterManifest:
    """Write a corrected LoRA as diffusers would: one file, with the configuration in its header if it was there."""
    hashes = _write_weights(folder, DIFFUSERS_WEIGHTS, tensors, AdapterV3, trained.metadata_with(config))
    manifest = AdapterV3.model_validate({**fields, "tensors": hashes, "component": trained.component})
    write_json(folder / MANIFEST, manifest_dict(manifest))
    return manifest


def write_refined(
    folder: Path,
    before: Adapter,
    tensors: Mapping[str, torch.Tensor],
    refinement: Refinement,
    *,
    base: BaseRecord,
    made_by: MadeBy,
) -> AdapterManifest:
    """Write the corrected adapter `before` with other `tensors`, by their stored names, in the layout that it has.

    `base` is the one on which it was refined.
    """
    assert before.manifest is not None  # it is corrected
    known = before.manifest.model_dump(exclude={"format_version", "made_by", "tensors"})
    fields = {"selection": None, "component": None, "refinements": [], **known, "base": base, "made_by": made_by}
    fields["refinements"] = [*fields["refinements"], refinement]
    if isinstance(before, DiffusersLora):
        hashes = _write_weights(folder, DIFFUSERS_WEIGHTS, tensors, AdapterV4, before.metadata_with(before.config))
    else:
        hashes = _write_weights(folder, WEIGHTS, tensors, AdapterV4, {})
        write_json(folder / CONFIG, before.config)
    manifest = AdapterV4.model_validate({**fields, "tensors": hashes})
    write_json(folder / MANIFEST, manifest_dict(manifest))
    return manifest


def _write_weights(
    folder: Path,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    model: type[AdapterManifest],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Write the tensors into one file with the mark of `model`'s version; returns their content hashes."""
    specs = [TensorSpec(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)]
    mark = mark_of(model.model_fields["format_version"].default)
    metadata = {"format": "pt", **metadata, MARK: mark}
    stem = name.removesuffix(".safetensors")
    writer = ShardedWriter(folder, stem, specs, max_shard_size=1 << 62, metadata=metadata)
    try:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])
        writer.finish()
    finally:
        writer.close()
    return writer.hashes
