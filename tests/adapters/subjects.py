"""A base, a LoRA on it as PEFT saves it, copies under other names, and what PEFT makes of each."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from tests import pico

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Subject:
    """A base on disk and in memory, and an adapter for it. Tests write into neither."""

    base: Path
    model: Any
    adapter: Path


def make(root: Path, family: str = "llama", **options: Any) -> Subject:
    """A pico base with a LoRA of random A and B."""
    model = pico.save_model(root / "base", family)
    train(model, root / "base", root / "adapter", **options)
    return Subject(root / "base", fresh(model, root / "base"), root / "adapter")


def train(model: Any, base: Path, folder: Path, *, seed: int = 0, **options: Any) -> None:
    """Save a LoRA of random values on a fresh copy of the base."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    trained = peft.get_peft_model(fresh(model, base), peft.LoraConfig(**settings))
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.save_pretrained(folder)


def fresh(model: Any, base: Path) -> Any:
    """The base as it is on disk; PEFT changes the model that it is given."""
    return type(model).from_pretrained(base).eval()


def changed(
    folder: Path,
    copy: Path,
    name: Callable[[str], str] = lambda name: name,
    value: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, value: value,
    **config: Any,
) -> Path:
    """A copy of an adapter with other names or values of tensors, and other fields in its configuration."""
    shutil.copytree(folder, copy)
    tensors = {name(key): value(key, tensor).contiguous() for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    fields = {**json.loads((folder / CONFIG).read_text()), **config}
    (copy / CONFIG).write_text(json.dumps(fields))
    return copy


def loaded(subject: Subject, folder: Path) -> tuple[Any, list[str]]:
    """The base with an adapter as PEFT loads it, and its warnings of missing keys."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(fresh(subject.model, subject.base), folder).eval()
    said = [str(warning.message) for warning in caught]
    return model, [line for line in said if "missing adapter keys" in line]


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT adds to the weight of each module, float64."""
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def logits(model: Any) -> torch.Tensor:
    """The outputs on a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(4, 20)[None]).logits
    return found


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of two sets of weights of the same modules, in the Frobenius norm."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
