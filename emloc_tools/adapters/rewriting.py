"""What `verify` changes of an adapter: names in its tensors and its configuration, and the scalings of its pairs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_tools.adapters.examination import targets_found
from emloc_tools.errors import NumericalError
from emloc_tools.files.adapter import LoraKeys
from emloc_tools.files.adapter_renamed import RenamedAdapter
from emloc_tools.files.adapter_rewritten import write_rewritten
from emloc_tools.files.manifest import MadeBy, manifest_dict


@dataclass(frozen=True)
class Changes:
    """What was changed: names of tensors, fields of the configuration (before and after), and by module B's factor."""

    renamed: dict[str, str]
    settings: dict[str, Any]
    folded: dict[str, float]


def rewrite(
    adapter: RenamedAdapter, model: nn.Module, folder: Path, *, fix: bool, fold: bool, made_by: MadeBy
) -> Changes:
    """Write into `folder` the adapter under its new names, and with the scalings that follow from one alpha (`fold`).

    With `fix` its configuration means the modules of all pairs on `model`, by their new names.
    """
    settings = patterns_by_new_names(adapter) if fix and adapter.renamed else {}
    if fix and not targets_found(adapter, model, settings):
        settings |= targets_by_name(adapter)
    factors: dict[str, float] = {}
    if fold:
        fields, factors = one_alpha(adapter)
        settings |= fields
    tensors = {name: adapter.read(name) for name in adapter.tensors.names()} | folded(adapter, factors)
    config = {**adapter.config, **settings}
    scalings = {module: keys.scaling for module, keys in adapter.loras.items()}
    if fold:
        scalings = {module: config["lora_alpha"] / keys.rank for module, keys in adapter.loras.items()}
    before = {name: adapter.config.get(name) for name in settings}
    changed = {name: [before[name], value] for name, value in settings.items() if value != before[name]}
    changes = Changes(adapter.renamed, changed, factors)
    note = {"made_by": manifest_dict(made_by), "adapter": adapter.hash, **vars(changes)}
    write_rewritten(folder, adapter, config, tensors, scalings=scalings, made_by=made_by, note=note)
    return changes


def patterns_by_new_names(adapter: RenamedAdapter) -> dict[str, Any]:
    """The fields of ranks and alphas for a renamed adapter; empty if those that it has mean the same as before."""
    pairs = {**adapter.loras, **adapter.embeddings}
    if all(adapter.means_the_same(module) for module in pairs):
        return {}
    ranks = {module: keys.rank for module, keys in pairs.items() if keys.rank != adapter.config.get("r")}
    alphas = {module: _alpha(adapter, keys) for module, keys in pairs.items()}
    others = {module: alpha for module, alpha in alphas.items() if alpha != adapter.config.get("lora_alpha")}
    return {"rank_pattern": _exactly(ranks), "alpha_pattern": _exactly(others)}


def targets_by_name(adapter: RenamedAdapter) -> dict[str, Any]:
    """The fields that make PEFT adapt exactly the modules that the adapter has pairs of."""
    fields = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return {
        "target_modules": sorted({**adapter.loras, **adapter.embeddings}),
        **{field: None for field in fields if adapter.config.get(field) is not None},
    }


def one_alpha(adapter: RenamedAdapter) -> tuple[dict[str, Any], dict[str, float]]:
    """Fields by which every pair's scaling is `lora_alpha / rank`, and by module what B is to be multiplied by.

    The alpha is the one that leaves most pairs as they are. Pairs of factor 1 are left out.
    """
    pairs = {**adapter.loras, **adapter.embeddings}
    wanted = {module: _integral(keys.scaling * keys.rank) for module, keys in pairs.items()}
    alpha = Counter(wanted.values()).most_common(1)[0][0]
    factors = {module: keys.scaling / (alpha / keys.rank) for module, keys in pairs.items() if wanted[module] != alpha}
    fields = {"lora_alpha": alpha, "use_rslora": False, "alpha_pattern": {}}
    return {field: value for field, value in fields.items() if adapter.config.get(field) or value}, factors


def folded(adapter: RenamedAdapter, factors: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Every B that is multiplied, by its name: computed in float32 and rounded once to the dtype that it has."""
    pairs = {**adapter.loras, **adapter.embeddings}
    tensors = {}
    for module, factor in factors.items():
        B = adapter.read(pairs[module].B)
        scaled = (B.float() * factor).to(B.dtype)
        if not torch.isfinite(scaled).all():
            raise NumericalError(
                f"{pairs[module].B}: times {factor:.6g} it exceeds {B.dtype}; save the LoRA in float32"
            )
        tensors[pairs[module].B] = scaled
    return tensors


def _alpha(adapter: RenamedAdapter, keys: LoraKeys) -> float:
    return _integral(keys.scaling * (math.sqrt(keys.rank) if adapter.config.get("use_rslora") else keys.rank))


def _integral(value: float) -> float:
    """A whole number as one: rank and scaling were divided and multiplied again."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _exactly(values: Mapping[str, float]) -> dict[str, float]:
    return {f"^{re.escape(module)}": value for module, value in values.items()}
