"""The good golden folders with statistics and factors of experts; see `golden_content` for how numbers are chosen."""

from __future__ import annotations

from pathlib import Path

import torch

from emloc_tools.files.calibration import GramEntry, write_calibration
from emloc_tools.files.emulator_writer import EmulatorWriter
from emloc_tools.files.manifest import CalibrationReference, FactoredExpert, FactoredStack, WeightingRecord
from emloc_tools.files.packing import pack_lower
from emloc_tools.files.tensors import TensorSpec, content_hash
from emloc_tools.records import Loss
from formats.golden_content import LARGE, MADE_BY, MODELING, TOKENS, base, data, values

STACK = "model.layers.0.mlp.experts.gate_up_proj"
EXPERTS, ROWS, COLUMNS, RANK = 3, 8, 4, 2  # the last expert has no data
ROUTED = (TOKENS // 2, TOKENS, 0)


def calibration_of_experts(folder: Path, *, gradients: bool) -> None:
    """Of one stack and a linear layer, with gradients of an expert and of the layer or without any."""
    folder.mkdir(parents=True)
    linear = "model.layers.0.self_attn.o_proj"
    entries = [GramEntry((f"{STACK}.{number}",), "input", COLUMNS, n) for number, n in enumerate(ROUTED) if n]
    entries.append(GramEntry((linear,), "output", 4, TOKENS))
    if gradients:
        entries.append(GramEntry((f"{STACK}.1",), "input", COLUMNS, TOKENS, "gradient", 2.5))
        entries.append(GramEntry((linear,), "output", 4, TOKENS, "gradient", 1.5))

    def packed(entry: GramEntry) -> torch.Tensor:
        X = values(entries.index(entry), entry.tokens, entry.features)
        return pack_lower(X.T @ X)

    shape = {"orientation": "conv1d", "has_bias": True, "weight_hash": content_hash(stored())}
    square = {"orientation": "linear", "has_bias": False, "weight_hash": content_hash(values(9, 4, 4))}
    loss: Loss | None = "next-token" if gradients else None
    write_calibration(
        folder,
        entries,
        packed,
        max_shard_size=LARGE,
        fields={
            "made_by": MADE_BY,
            "base": base("GptOssForCausalLM"),
            "data": [data(0)],
            "layers": {linear: {"out_features": 4, "in_features": 4, **square}},
            "experts": {STACK: {"out_features": ROWS, "in_features": COLUMNS, **shape, "experts": EXPERTS}},
            "unreached": [f"{STACK}.2"],
            "loss": loss,
        },
    )


def emulator_of_experts(folder: Path, *, linear: bool, weighted: bool = False) -> None:
    """With one stack, and a linear layer or none: then the guard has the name of the stack."""
    folder.mkdir(parents=True)
    layers = {"model.layers.0.self_attn.o_proj": (4, 4, 1)} if linear else {}
    bias = values(2, EXPERTS, ROWS)
    writer = EmulatorWriter(
        folder,
        dense=[TensorSpec(f"{STACK}_bias", torch.float32, tuple(bias.shape))],
        factored=layers,
        stacks={STACK: (EXPERTS, ROWS, COLUMNS, RANK)},
        dtype=torch.float32,
        max_shard_size=LARGE,
    )
    writer.write_dense(f"{STACK}_bias", bias)
    S = torch.tensor([[4.0, 2.0], [2.0, 1.0], [8.0, 0.5]])
    writer.write_factors(STACK, values(3, EXPERTS, ROWS, RANK), S, values(4, EXPERTS, RANK, COLUMNS))
    quality = {"relative_error": 0.5, "total_energy": 32.0, "energetic": RANK, "floored": 0}
    records = {}
    for name, (rows, columns, rank) in layers.items():
        writer.write_factors(name, values(5, rows, rank), torch.ones(rank), values(6, rank, columns))
        shape = {"out_features": rows, "in_features": columns, "orientation": "linear", "rank": rank}
        records[name] = {**shape, **quality, "weight_hash": content_hash(values(9, 4, 4)), "energetic": rank}
    stack = FactoredStack(
        out_features=ROWS,
        in_features=COLUMNS,
        orientation="conv1d",
        rank=RANK,
        weight_hash=content_hash(stored()),
        experts=[FactoredExpert.model_validate({"tokens": tokens, **quality}) for tokens in ROUTED],
    )
    writer.finish(
        base_config={"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 6},
        class_name="EmlocGptOssForCausalLM",
        auto_map={"AutoModelForCausalLM": "modeling_emloc.EmlocGptOssForCausalLM"},
        modeling_file="modeling_emloc",
        modeling=MODELING,
        fields={
            "made_by": MADE_BY,
            "base": base("GptOssForCausalLM"),
            "calibration": CalibrationReference(hash=data(0).hash, data=[data(0)]),
            "allocation": "uniform",
            "eigen_dtype": "float64",
            "base_parameters": EXPERTS * ROWS * (COLUMNS + 1) + 16 * len(layers),
            "layers": records,
            "experts": {STACK: stack},
            "ignored_tensors": [],
        },
        weighting=WeightingRecord(damping=0.05, sensitivity={f"{STACK}.1": 1.5}) if weighted else None,
    )


def stored() -> torch.Tensor:
    """The stack's weight as its model holds it: transposed."""
    return values(12, EXPERTS, COLUMNS, ROWS)
