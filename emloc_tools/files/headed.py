"""Write a base with a head of its own as a plain Hugging Face model folder that shares the base's weights.

The base's files get other names, as one more than before belongs to the set, but no other bytes: they are hard links
where the file system allows it. `emloc-head.json` is provenance and no format of its own; it marks the folder as one
that `--overwrite` may replace.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.folders import write_json, write_text
from emloc_tools.files.tensors import MAX_SHARD_SIZE, ShardedWriter, TensorFolder, TensorSpec

NOTE = "emloc-head.json"
INDEX = "model.safetensors.index.json"

CARD = """---
library_name: transformers
base_model: {base}
pipeline_tag: text-classification
tags:
- emloc
---

# {base} with a head for {labels} labels

**{base}** as a {architecture}, made by emloc-tools {version}. The head was fitted on what the base gives for {samples}
labelled texts; the base's own weights are unchanged.

It is an ordinary model, and the base of an emulator: calibrate on it, build the emulator, and train a LoRA with the
head frozen. Pad with token {pad}, by which the model finds the end of a text. What it was made from is in `{note}`.
"""


@dataclass(frozen=True)
class Shards:
    """The tensor files of a headed base: how many are hard links, copies, and new; and the bytes of all tensors."""

    linked: int
    copied: int
    written: int


def write_shards(
    folder: Path,
    base: TensorFolder,
    locate: Callable[[str], Path | None],
    head: Mapping[str, torch.Tensor],
    *,
    prefix: str = "",
) -> Shards:
    """Put the base's tensors and those of `head` into `folder`, with an index.

    `locate` finds the base's files. With a `prefix` every tensor of the base is written anew under its name with the
    prefix: versions of transformers before 5 take a file either with all names of a body alone, or with none.
    """
    if prefix:
        return _rewrite(folder, base, head, prefix)
    files = list(dict.fromkeys(base.weight_map[name] for name in base.names()))
    names = [f"model-{number:05d}-of-{len(files) + 1:05d}" for number in range(1, len(files) + 2)]
    linked = 0
    for file, name in zip(sorted(files), names, strict=False):
        path = locate(file)
        if path is None:
            raise FileNotFoundError(file)
        linked += _link_or_copy(path, folder / f"{name}.safetensors")
    renamed = dict(zip(sorted(files), names, strict=False))
    specs = [TensorSpec(key, head[key].dtype, tuple(head[key].shape)) for key in sorted(head)]
    _fill(ShardedWriter(folder, names[-1], specs, max_shard_size=1 << 62, metadata={"format": "pt"}), head)
    weight_map = {key: f"{renamed[file]}.safetensors" for key, file in base.weight_map.items()}
    weight_map |= dict.fromkeys(head, f"{names[-1]}.safetensors")
    total = sum(base.spec(key).nbytes for key in base.names()) + sum(tensor.nbytes for tensor in head.values())
    _write_index(folder, weight_map, total)
    return Shards(linked, len(files) - linked, 1)


def write_rest(folder: Path, *, config: Mapping[str, Any], note: Mapping[str, Any], samples: int, pad: int) -> None:
    """Write config.json, the note and a model card."""
    write_json(folder / "config.json", config)
    write_json(folder / NOTE, note)
    card = CARD.format(
        base=note["base"]["id"],
        architecture=config["architectures"][0],
        labels=len(config["label2id"]),
        version=note["made_by"]["emloc_tools"],
        samples=samples,
        pad=pad,
        note=NOTE,
    )
    write_text(folder / "README.md", card)


def _rewrite(folder: Path, base: TensorFolder, head: Mapping[str, torch.Tensor], prefix: str) -> Shards:
    keys = sorted(base.weight_map, key=base.weight_map.__getitem__)  # the order of the files
    specs = [TensorSpec(f"{prefix}{key}", base.spec(key).dtype, base.spec(key).shape) for key in keys]
    specs += [TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in sorted(head.items())]
    writer = ShardedWriter(folder, "model", specs, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
    try:
        for key in keys:
            writer.write(f"{prefix}{key}", base.read(key))
    except BaseException:
        writer.close()
        raise
    _fill(writer, head)
    files = set(writer.weight_map.values())
    if len(files) > 1:
        _write_index(folder, writer.weight_map, writer.total_size)
    return Shards(0, 0, len(files))


def _fill(writer: ShardedWriter, tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
        writer.finish()
    finally:
        writer.close()


def _write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": {key: weight_map[key] for key in sorted(weight_map)}}
    write_json(folder / INDEX, index)


def _link_or_copy(source: Path, target: Path) -> bool:
    """Whether `target` became a hard link; not every file system has them, and none leads to another one."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True
