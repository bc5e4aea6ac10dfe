"""Emulators of the families, and an independent reference for what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests import pico
from tests.experts.conftest import MAX_LENGTH, Case
from tests.experts.families import FAMILIES
from tests.stages.reference import read_json, read_tensors


def product(tensors: dict[str, torch.Tensor], stack: str) -> torch.Tensor:
    """W_E (experts, out, in) of a stack, float64."""
    U, S, Vh = (tensors[f"{stack}_{part}"].double() for part in ("U", "S", "Vh"))
    return torch.einsum("eok,ek,eki->eoi", U, S, Vh)


def logits(model: Any, case: Case) -> torch.Tensor:
    """Of one sample."""
    ids = torch.tensor([pico.token_ids(case.data, case.base, MAX_LENGTH)[2]])
    with torch.no_grad():
        result: torch.Tensor = model.eval()(ids).logits
    return result


def densify(case: Case, folder: Path, **options: Any) -> Any:
    """The base in memory with W_E of every stack and layer in its weights: an independent reference."""
    model = getattr(transformers, FAMILIES[case.family].cls).from_pretrained(case.base, **options)
    tensors, ranks = read_tensors(folder), read_json(folder / "config.json")["emloc"]["ranks"]
    with torch.no_grad():
        for name in ranks:
            if name in case.W:
                W = product(tensors, name)
                model.get_parameter(name).copy_(W.mT if FAMILIES[case.family].transposed else W)
            else:
                U, S, Vh = (tensors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
                model.get_parameter(f"{name}.weight").copy_((U * S) @ Vh)
    return model
