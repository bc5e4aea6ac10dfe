"""Write an adapter again under other names or with other scalings, and a note of what was changed.

`emloc-verify.json` is provenance and no format of its own. It marks the folder as one that `--overwrite` may replace.
A corrected adapter stays one: its `emloc.json` tells of the new tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.adapter import CONFIG, MANIFEST, MARK, WEIGHTS, Adapter, mark_of
from emloc_tools.files.adapter_renamed import RenamedAdapter
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_WEIGHTS
from emloc_tools.files.diffusers_lora import DiffusersLora
from emloc_tools.files.folders import write_json
from emloc_tools.files.manifest import AdapterManifest, MadeBy, manifest_dict
from emloc_tools.files.tensors import ShardedWriter, TensorSpec

NOTE = "emloc-verify.json"


def write_rewritten(
    folder: Path,
    before: RenamedAdapter,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    scalings: Mapping[str, float],
    made_by: MadeBy,
    note: Mapping[str, Any],
) -> None:
    """Write `tensors`, by their new names, and `config` in the layout that the adapter `before` has.

    In the manifest of a corrected one, what `correct` did stays, and `made_by` is new. `scalings` are those of the
    modules, by their new names, that follow from `config`.
    """
    metadata = {"format": "pt"}
    if isinstance(before, DiffusersLora):
        metadata |= before.metadata_with(config)
    else:
        write_json(folder / CONFIG, config)
    if before.manifest is not None:
        metadata[MARK] = mark_of(before.manifest.format_version)
    hashes = _write_weights(folder, before, tensors, metadata)
    if before.manifest is not None:
        write_json(folder / MANIFEST, manifest_dict(_manifest(before, before.manifest, scalings, hashes, made_by)))
    write_json(folder / NOTE, note)


def _write_weights(
    folder: Path, before: Adapter, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write the file of weights; returns the content hashes of the tensors."""
    name = DIFFUSERS_WEIGHTS if isinstance(before, DiffusersLora) else WEIGHTS
    specs = [TensorSpec(key, tensors[key].dtype, tuple(tensors[key].shape)) for key in sorted(tensors)]
    writer = ShardedWriter(folder, Path(name).stem, specs, max_shard_size=1 << 62, metadata=metadata)
    try:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])
        writer.finish()
    finally:
        writer.close()
    return writer.hashes


def _manifest(
    before: RenamedAdapter,
    manifest: AdapterManifest,
    scalings: Mapping[str, float],
    hashes: Mapping[str, str],
    made_by: MadeBy,
) -> AdapterManifest:
    """The manifest under the new names."""
    layers = {}
    for module, record in manifest.layers.items():
        name = before.new_module(module)
        layers[name] = record.model_copy(update={"scaling": scalings[name]})
    unchanged = [before.renamed.get(name, name) for name in manifest.unchanged]
    return manifest.model_copy(
        update={"made_by": made_by, "layers": layers, "unchanged": unchanged, "tensors": dict(sorted(hashes.items()))}
    )
