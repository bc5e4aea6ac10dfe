"""A tiny model and its PEFT adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

PREFIX = "base_model.model."
NAMES = ["block.0.up", "block.0.down", "block.1.up", "block.1.down"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Tiny(nn.Module):
    """Two blocks and a head; `config` is what PEFT looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.score = nn.ModuleList(Block() for _ in range(2)), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        return self.score(x)


def train(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PEFT adapter of random values, saved by PEFT."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["up", "down"], **options}
    peft = get_peft_model(Tiny(), LoraConfig(**settings))
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    peft.save_pretrained(folder)
    return peft


def change(path: Path, update: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    update(value)
    path.write_text(json.dumps(value))
