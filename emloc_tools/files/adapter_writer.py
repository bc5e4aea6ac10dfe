"""Write the adapters that `correct` makes: PEFT's two files, with a mark in the weights, and `emloc.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.adapter import CONFIG, MANIFEST, MARK, mark_of
from emloc_tools.files.folders import write_json
from emloc_tools.files.manifest import AdapterManifest, AdapterV1, AdapterV2, Selection, manifest_dict
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
    specs = [TensorSpec(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)]
    metadata = {"format": "pt", MARK: mark_of(model.model_fields["format_version"].default)}
    writer = ShardedWriter(folder, "adapter_model", specs, max_shard_size=1 << 62, metadata=metadata)
    try:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])
        writer.finish()
    finally:
        writer.close()
    chosen = {} if selection is None else {"selection": selection}
    manifest = model.model_validate({**fields, "tensors": writer.hashes, **chosen})
    write_json(folder / CONFIG, config)
    write_json(folder / MANIFEST, manifest_dict(manifest))
    return manifest
