"""Bases with LoRAs trained on them, merged by the package and by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from emloc_tools.stages.merge import merge
from tests import pico
from tests.stages.adapters import on


@dataclass(frozen=True)
class Case:
    """A base on disk and in memory, and a LoRA trained on it."""

    base: Path
    model: Any
    adapter: Path

    def in_memory(self) -> Any:
        """What PEFT makes of the two."""
        return on(type(self.model).from_pretrained(self.base), self.adapter).merge_and_unload().eval()


Make = Callable[..., Case]


def make_case(root: Path, family: str = "llama", save: dict[str, Any] | None = None, **options: Any) -> Case:
    """A model of a family and a LoRA with random A and B, saved by PEFT; `options` go to `LoraConfig`."""
    model = pico.save_model(root / "base", family, **(save or {}))
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(type(model).from_pretrained(root / "base"), LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(root / "adapter")
    return Case(root / "base", model, root / "adapter")


def merge_case(case: Case, output: Path, **options: Any) -> Any:
    """Merge a case."""
    return merge(**{"base": str(case.base), "adapter": case.adapter, "output": output, **options})


def load_all(folder: Path, cls: Any) -> Any:
    """Load by the stock class, which must find exactly the tensors that it wants."""
    model, found = cls.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """Logits of one batch, float64."""
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found.double()
