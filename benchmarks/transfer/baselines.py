"""Other light stand-ins for a base, on the same footing as an emulator: what a LoRA is trained on before it moves over.

Each is written as a plain model folder. None has a correction, and none is part of emloc-tools.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from emloc_tools.demo import make_base

BLOCK = re.compile(r"(?<=model\.layers\.)\d+")
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


def drop_layers(base: Path, ratio: float, folder: Path) -> list[int]:
    """Keep every n-th block so that about `ratio` of them remain (Offsite-Tuning); returns the kept blocks' numbers."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    depth = config["num_hidden_layers"]
    count = max(1, round(ratio * depth))
    kept = sorted({math.floor((index + 0.5) * depth / count) for index in range(count)})
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        block = BLOCK.search(name)
        if block is None:
            tensors[name] = tensor
        elif int(block[0]) in kept:
            tensors[BLOCK.sub(str(kept.index(int(block[0]))), name)] = tensor
    _save(base, folder, tensors, {**config, "num_hidden_layers": len(kept)})
    return kept


def prune(base: Path, ratio: float, folder: Path) -> None:
    """Keep the `ratio` largest values of every linear layer in a block, and zeros elsewhere (LoRAM, UPop)."""
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if LINEAR.fullmatch(name):
            magnitude = tensor.abs().flatten().float()
            threshold = magnitude.kthvalue(max(1, round((1 - ratio) * magnitude.numel()))).values
            tensors[name] = torch.where(tensor.abs().float() > threshold, tensor, 0)
    _save(base, folder, tensors, json.loads((base / "config.json").read_text(encoding="utf-8")))


def train_smaller(base: Path, ratio: float, folder: Path) -> None:
    """Train a narrower model on the base's own text, for as many steps: its linear layers hold `ratio` of the values.

    Their size goes with the square of the width.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    width = 8 * round(config["hidden_size"] * math.sqrt(ratio) / 8)
    make_base.main(["--output", str(folder), "--hidden-size", str(width)])


def renumber_adapter(adapter: Path, kept: list[int], folder: Path) -> None:
    """The LoRA of a model with dropped blocks, under the block numbers of the base."""
    shutil.copytree(adapter, folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {BLOCK.sub(lambda match: str(kept[int(match[0])]), name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _save(base: Path, folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
