"""The parts of a base or an emulator: layers that are or become factors, and what is dense, with the reasons."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from emloc_tools.errors import EmlocError, UnsupportedError
from emloc_tools.files.json_files import read_json
from emloc_tools.models import diffusion
from emloc_tools.models.base import open_base
from emloc_tools.models.dense import DensePart, dense_parts
from emloc_tools.models.layers import select_layers
from emloc_tools.models.skeleton import build_skeleton, load_config, model_class
from emloc_tools.models.source import open_source
from emloc_tools.records import Layer

Row = dict[str, Any]

NOT_CHOSEN = "left out by --targets or --exclude"
LEFT_OUT = "not chosen, not reached by the samples, or not smaller at this size"


def parts_of_base(
    base: str, *, revision: str | None, targets: str | None, exclude: str | None, trust_remote_code: bool
) -> tuple[Row, list[Row], list[Row]]:
    """Facts of a base, a row for every layer and stack that would become factors, and rows of what would stay dense.

    The model is built on meta. Of a local folder the headers of its weights are read, and must fit the model; of a Hub
    id no weights are fetched.
    """
    facts: Row = {}
    if Path(base).is_dir():
        opened = open_base(base, revision=revision, trust_remote_code=trust_remote_code)
        with opened.tensors:
            weights = opened.weights()
            stored = [weights.stored_spec(name) for name in weights.stored_names()]
            facts["stored_bytes"] = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in stored)
            facts["unused_tensors"] = len(weights.ignored)
        source, model = opened.source, opened.model
    else:
        source = open_source(base, revision=revision, trust_remote_code=trust_remote_code)
        config = load_config(source, trust_remote_code=trust_remote_code)
        cls = model_class(config, source, trust_remote_code=trust_remote_code)
        model = build_skeleton(cls, config, dtype=torch.float32)
    chosen = select_layers(model, targets=targets, exclude=exclude)
    factored = [layer for layer in chosen if layer.parameters > layer.rank_cost]
    dense = dense_parts(model, [layer.name for layer in factored], NOT_CHOSEN)
    described = {
        "base": base,
        **({"revision": source.revision} if source.revision else {}),
        "architecture": type(model).__name__,
        "parameters": sum({id(parameter): parameter.numel() for parameter in model.parameters()}.values()),
        **facts,
        **_count(factored),
        "parameters_in_them": sum(layer.parameters for layer in factored),
        **_by_reason(dense),
    }
    return described, [_row(layer) for layer in factored], [asdict(part) for part in dense]


def dense_parts_of_emulator(folder: Path, architecture: str, factored: Collection[str]) -> tuple[Row, list[Row]]:
    """Facts and rows of what an emulator holds dense. The code in its folder is not executed.

    Where the libraries do not know its model class, the facts say so and there are no rows.
    """
    try:
        dense = dense_parts(_skeleton_of_emulator(folder, architecture), factored, LEFT_OUT)
    except EmlocError as error:
        return {"dense_parts": f"unknown here: {error}"}, []
    return _by_reason(dense), [asdict(part) for part in dense]


def _skeleton_of_emulator(folder: Path, architecture: str) -> nn.Module:
    """The model class that the emulator was made from, on meta, with its configuration."""
    values = read_json(folder / "config.json", "model config")
    if diffusion.CLASS in values:
        own = {key: value for key, value in values.items() if key not in ("auto_map", "quantization_config")}
        cls = diffusion.diffusers_class(architecture, str(folder))
        return build_skeleton(cls, diffusion.DiffusersConfig(architecture, own), dtype=torch.float32)
    known = getattr(transformers, architecture, None)
    if known is None:
        raise UnsupportedError(f"transformers {transformers.__version__} has no model class {architecture}")
    return build_skeleton(known, load_config(open_source(str(folder))), dtype=torch.float32)


def _count(layers: Sequence[Layer]) -> Row:
    stacks = sum(layer.experts is not None for layer in layers)
    return {"layers_to_factor": len(layers) - stacks, **({"stacks_of_experts": stacks} if stacks else {})}


def _row(layer: Layer) -> Row:
    experts = {} if layer.experts is None else {"experts": layer.experts}
    return {
        "layer": layer.name,
        "out": layer.out_features,
        "in": layer.in_features,
        "parameters": layer.parameters,
        **experts,
    }


def _by_reason(dense: Sequence[DensePart]) -> Row:
    """The parameters that stay dense, in all and by reasons."""
    reasons: dict[str, int] = {}
    for part in dense:
        reasons[part.reason] = reasons.get(part.reason, 0) + part.parameters
    return {"dense_parameters": sum(reasons.values()), "dense_by_reason": reasons}
