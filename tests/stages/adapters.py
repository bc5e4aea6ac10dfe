"""Adapters on disk for the tests of correct: read without the package, and changed by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from emloc_tools import load_emulator
from tests.stages.reference import read_json, read_tensors

PREFIX = "base_model.model."


def on(model: Any, folder: Path) -> Any:
    """A model with an adapter, in evaluation mode, as PEFT loads it."""
    return peft.PeftModel.from_pretrained(model, folder).eval()


def on_emulator(emulator: Path, folder: Path) -> Any:
    """The same for an emulator."""
    return on(load_emulator(emulator), folder)


def pairs(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`A (r, in)` and `B (out, r)` per module, float64."""
    tensors = read_tensors(folder)
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        module.removeprefix(PREFIX): (
            tensors[f"{module}.lora_A.weight"].double(),
            tensors[f"{module}.lora_B.weight"].double(),
        )
        for module in modules
    }


def changed(
    folder: Path,
    copy: Path,
    *,
    tensor: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]] | None = None,
    **config: Any,
) -> Path:
    """A copy of an adapter with other fields in its configuration; `tensor(name, value)` gives new names and values."""
    shutil.copytree(folder, copy)
    if tensor is not None:
        results = [tensor(name, value) for name, value in read_tensors(folder).items()]
        save_file({name: value.contiguous() for name, value in results}, copy / "adapter_model.safetensors")
    fields = {**read_json(copy / "adapter_config.json"), **config}
    (copy / "adapter_config.json").write_text(json.dumps(fields))
    return copy
