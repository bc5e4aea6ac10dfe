"""Small artifacts made by the package's writers, for tests that then look at them from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.calibration import GramEntry, write_calibration
from emloc_tools.files.emulator_writer import EmulatorWriter
from emloc_tools.files.manifest import (
    BaseRecord,
    CalibrationManifest,
    CalibrationReference,
    DataRecord,
    EmulatorManifest,
    FactoredLayer,
    WeightingRecord,
    made_by,
)
from emloc_tools.files.packing import pack_lower
from emloc_tools.files.tensors import TensorSpec
from emloc_tools.records import Loss

HASH = "xxh3_128:" + "0123456789abcdef" * 2
BASE = BaseRecord(id="example/base", revision=None, architecture="LlamaForCausalLM")
DATA = DataRecord(file="data.jsonl", hash=HASH, samples=2, tokens=10, max_length=None, seed=0)
SHAPES = {"block.0.up": (6, 4), "block.0.down": (4, 6), "block.1.up": (6, 4)}


def gram(features: int, *, seed: int = 0, tokens: int = 10) -> torch.Tensor:
    """A Gram of integers, exact in float32."""
    X = torch.randint(-4, 5, (tokens, features), generator=torch.Generator().manual_seed(seed)).float()
    return X.T @ X


def calibration_fields(names: list[str]) -> dict[str, Any]:
    """The fields of a calibration manifest that are not about tensors."""
    layers = {
        name: {
            "out_features": SHAPES[name][0],
            "in_features": SHAPES[name][1],
            "orientation": "linear",
            "has_bias": False,
            "weight_hash": HASH,
        }
        for name in names
    }
    return {"made_by": made_by("test"), "base": BASE, "data": [DATA], "layers": layers, "unreached": []}


def save_calibration(
    folder: Path, *, max_shard_size: int = 1 << 40, gradients: bool = False, loss: Loss | None = None
) -> CalibrationManifest:
    """Both `up` share an input Gram (as if they read one tensor), `down` has its outputs'.

    The gradients are those of one `up`, at its input, and of `down`, at its output; the other `up` has none.
    """
    folder.mkdir()
    entries = [
        GramEntry(("block.0.up", "block.1.up"), "input", 4, 10),
        GramEntry(("block.0.down",), "output", 4, 9),
    ]
    if gradients:
        entries += [
            GramEntry(("block.1.up",), "input", 4, 8, "gradient", 2.5),
            GramEntry(("block.0.down",), "output", 4, 7, "gradient", 0.1),
        ]
    return write_calibration(
        folder,
        entries,
        lambda entry: pack_lower(gram(entry.features, seed=entry.tokens)),
        max_shard_size=max_shard_size,
        fields=calibration_fields(list(SHAPES)) | ({} if loss is None else {"loss": loss}),
    )


def factors(seed: int, rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random U and Vh, and S sorted, float32."""
    generator = torch.Generator().manual_seed(seed)
    U, Vh = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return U, torch.rand(rank, generator=generator).sort(descending=True).values + 0.5, Vh


def save_emulator(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int = 1 << 40,
    config: dict[str, Any] | None = None,
    weighting: WeightingRecord | None = None,
) -> EmulatorManifest:
    """Every layer factored with rank 2; a dense embedding, and a bias on `block.0.up`. Calibrated if weighted."""
    folder.mkdir()
    dense = {"embed.weight": torch.arange(20.0).view(5, 4), "block.0.up.bias": torch.arange(6.0)}
    writer = EmulatorWriter(
        folder,
        dense=[TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()],
        factored={name: (*shape, 2) for name, shape in SHAPES.items()},
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    for name, tensor in dense.items():
        writer.write_dense(name, tensor)
    records = {}
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items()):
        writer.write_factors(name, *factors(seed, rows, columns, 2))
        records[name] = FactoredLayer(
            out_features=rows,
            in_features=columns,
            orientation="linear",
            rank=2,
            weight_hash=HASH,
            relative_error=0.25,
            total_energy=2.0,
            energetic=2,
            floored=0,
        )
    return writer.finish(
        base_config=config or {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        class_name="EmlocLlamaForCausalLM",
        auto_map={"AutoModel": "modeling_emloc.EmlocLlamaForCausalLM"},
        modeling_file="modeling_emloc",
        modeling="raise SystemExit('the modeling file was executed')\n",
        fields={
            "made_by": made_by("test"),
            "base": BASE,
            "calibration": weighting and CalibrationReference(hash=HASH, data=[DATA]),
            "allocation": "given",
            "eigen_dtype": "float64",
            "base_parameters": 100,
            "layers": records,
            "ignored_tensors": [],
        },
        weighting=weighting,
    )
