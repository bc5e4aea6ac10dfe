"""What the good golden folders hold: writes one calibration, emulator or adapter.

The numbers are small dyadic fractions, so that sums and products are exact and no library decides a bit. Two things are
pinned that real folders take from their surroundings: the versions in `made_by`, and the Python file of an emulator,
which is a stub here because no reader may run it. The tensors obey the formats; they come from no real model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from emloc_tools.files.adapter_writer import write_adapter, write_diffusers_lora, write_refined
from emloc_tools.files.calibration import GramEntry, write_calibration
from emloc_tools.files.diffusers_lora import DiffusersLora, open_adapter
from emloc_tools.files.emulator_writer import EmulatorWriter
from emloc_tools.files.folders import write_json
from emloc_tools.files.manifest import (
    BaseRecord,
    CalibrationReference,
    Candidate,
    DataRecord,
    FactoredLayer,
    MadeBy,
    Refinement,
    Selection,
    WeightingRecord,
)
from emloc_tools.files.packing import pack_lower
from emloc_tools.files.tensors import ShardedWriter, TensorSpec, content_hash
from emloc_tools.records import GradientGram, Library, Loss, Orientation, Side

MADE_BY = MadeBy(emloc_tools="1.0.0", libraries={"torch": "2.0.0", "transformers": "5.0.0"}, command="make_golden")
REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKENS = 12
MODELING = '"""In a real emulator: the model class with low-rank layers. No reader of the format runs it."""\n'
LARGE = 1 << 40  # bytes; one shard
ROOT = (0.5, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 2.0)  # R, diagonal, of a weighted layer with 8 outputs: the mean of R² is 1

# adapter, scale, loss per token, and its standard errors: by itself, and of the differences from the first and the last
MEASURED = (
    ("none", 0.0, 3.25, 0.25, 0.0, 0.125),
    ("trained", 0.5, 3.0, 0.25, 0.0625, 0.03125),
    ("corrected", 0.5, 3.125, 0.25, 0.0625, 0.03125),
    ("corrected", 1.0, 3.5, 0.25, 0.125, 0.0),
)
CANDIDATES = [Candidate.model_validate(dict(zip(Candidate.model_fields, row, strict=True))) for row in MEASURED]

Layers = Mapping[str, tuple[int, int, Orientation]]
RankedLayers = Mapping[str, tuple[int, int, Orientation, int]]
Grams = Sequence[tuple[Sequence[str], Side]]


def values(seed: int, *shape: int) -> torch.Tensor:
    """Multiples of 1/8 in -2..2 without a pattern, float32."""
    numbers = [((index + 1) * (2 * seed + 1) * 2654435761 % 2**32 >> 20) % 33 - 16 for index in range(math.prod(shape))]
    return torch.tensor(numbers, dtype=torch.float32).reshape(shape) / 8


def base(architecture: str) -> BaseRecord:
    family = next((name for name in ("gpt2", "flux") if architecture.lower().startswith(name)), "llama")
    return BaseRecord(id=f"example/tiny-{family}", revision=REVISION, architecture=architecture)


def data(seed: int) -> DataRecord:
    digest = content_hash(values(seed, 4))
    return DataRecord(file=f"task-{seed}.jsonl", hash=digest, samples=3, tokens=TOKENS, max_length=2048, seed=seed)


def calibration(
    folder: Path,
    layers: Layers,
    grams: Grams,
    *,
    max_shard_size: int = LARGE,
    parts: int = 1,
    unreached: tuple[str, ...] = (),
    gradients: tuple[str, ...] = (),
    loss: Loss | None = None,
    architecture: str = "LlamaModel",
) -> None:
    """`layers` maps a name to (out, in, orientation); `grams` are (layers, side); `gradients` are layers."""
    folder.mkdir(parents=True)
    entries = [
        GramEntry(tuple(names), side, columns if side == "input" else rows, TOKENS * parts)
        for names, side in grams
        for rows, columns, _ in [layers[names[0]]]
    ]
    found = {name: gradient(list(layers).index(name), TOKENS * parts, layers[name]) for name in gradients}
    of_gradients = [
        GramEntry((name,), gram.side, len(gram.matrix), gram.tokens, "gradient", gram.energy)
        for name, gram in found.items()
    ]

    def packed(entry: GramEntry) -> torch.Tensor:
        if entry.kind == "gradient":
            return pack_lower(found[entry.layers[0]].matrix)
        X = values(entries.index(entry), TOKENS * parts, entry.features)
        return pack_lower(X.T @ X)

    write_calibration(
        folder,
        [*entries, *of_gradients],
        packed,
        max_shard_size=max_shard_size,
        fields={
            "made_by": MADE_BY,
            "base": base("GPT2LMHeadModel" if any(layer[2] == "conv1d" for layer in layers.values()) else architecture),
            "data": [data(seed) for seed in range(parts)],
            "layers": {
                name: {
                    "out_features": rows,
                    "in_features": columns,
                    "orientation": orientation,
                    "has_bias": orientation == "conv1d",
                    "weight_hash": content_hash(weight(index, rows, columns, orientation)),
                }
                for index, (name, (rows, columns, orientation)) in enumerate(layers.items())
            },
            "unreached": list(unreached),
            "loss": loss,
        },
    )


def gradient(index: int, tokens: int, layer: tuple[int, int, Orientation]) -> GradientGram:
    """The Gram of made-up gradients at the output of the `index`-th layer, on its smaller side."""
    rows, columns, orientation = layer
    stored = weight(index, rows, columns, orientation).double()
    W = stored.T if orientation == "conv1d" else stored
    g = values(50 + index, tokens, rows).double()  # in float64 the products below are exact
    h = g @ W if rows > columns else g
    side: Side = "input" if rows > columns else "output"
    return GradientGram((h.T @ h).float(), side, tokens, float((g**2).sum()))


def weight(seed: int, rows: int, columns: int, orientation: Orientation) -> torch.Tensor:
    """A base's weight as its checkpoint holds it."""
    W = values(10 + seed, rows, columns)
    return W.T.contiguous() if orientation == "conv1d" else W


def emulator(
    folder: Path,
    layers: RankedLayers,
    *,
    dtype: torch.dtype,
    calibrated: bool,
    weighted: bool = False,
    max_shard_size: int = LARGE,
    library: Library = "transformers",
    code: Mapping[str, str] | None = None,
) -> None:
    """`layers` maps a name to (out, in, orientation, rank).

    For an exactly orthonormal V, `W_E = V Vᵀ W`, or `R⁻¹ V Vᵀ R W` where it is weighted.
    """
    folder.mkdir(parents=True)
    conv1d = any(layer[2] == "conv1d" for layer in layers.values())
    dense = {"lm_head.weight" if library == "transformers" else "proj_out.weight": values(1, 6, 4)}
    if conv1d:
        dense |= {f"{name}.bias": values(2, rows) for name, (rows, *_) in layers.items()}
    dense = {name: tensor.to(dtype) for name, tensor in dense.items()}
    writer = EmulatorWriter(
        folder,
        dense=[TensorSpec(name, dtype, tuple(tensor.shape)) for name, tensor in dense.items()],
        factored={name: (rows, columns, rank) for name, (rows, columns, _, rank) in layers.items()},
        dtype=dtype,
        max_shard_size=max_shard_size,
        library=library,
    )
    for name, tensor in dense.items():
        writer.write_dense(name, tensor)
    records = {}
    for index, (name, (rows, columns, orientation, rank)) in enumerate(layers.items()):
        stored = weight(index, rows, columns, orientation)
        W = stored.T if orientation == "conv1d" else stored
        signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0
        V = torch.zeros(rows, rank)
        V[:4] = signs[:, :rank]
        S = torch.tensor([4.0, 2.0, 0.5])[:rank]
        R = torch.tensor(ROOT if weighted else (1.0,) * rows)[:, None]
        writer.write_factors(name, V / R, S, (V.T @ (R * W)) / S[:, None])
        X = (values(30 + index, TOKENS, columns) if calibrated else torch.eye(columns)).double()
        Y, lost = X @ (R * W).T.double(), X @ (R * W - V @ (V.T @ (R * W))).T.double()
        records[name] = FactoredLayer(
            out_features=rows,
            in_features=columns,
            orientation=orientation,
            rank=rank,
            weight_hash=content_hash(stored.to(dtype)),
            relative_error=math.sqrt(float((lost**2).sum()) / float((Y**2).sum())),
            total_energy=float((Y**2).sum()) / (TOKENS if calibrated else 1),
            energetic=rank,
            floored=0,
        )
    architecture, auto = "GPT2LMHeadModel" if conv1d else "LlamaForCausalLM", "AutoModelForCausalLM"
    config = {"architectures": [architecture], "model_type": "gpt2" if conv1d else "llama", "vocab_size": 6}
    if library == "diffusers":
        architecture, auto = "FluxTransformer2DModel", "AutoModel"
        config = {"_class_name": architecture, "in_channels": 4}
    auto_map = {auto: f"modeling_emloc.Emloc{architecture}"}
    if code:
        auto_map["AutoConfig"] = f"{next(iter(code)).removesuffix('.py')}.OwnConfig"
    class_name = f"Emloc{architecture}"
    writer.finish(
        base_config=config,
        class_name=class_name,
        auto_map=auto_map,
        code={name: text.encode() for name, text in (code or {}).items()},
        modeling_file="modeling_emloc",
        modeling=MODELING,
        fields={
            "made_by": MADE_BY,
            "base": base(architecture),
            "calibration": CalibrationReference(hash=data(0).hash, data=[data(0)]) if calibrated else None,
            "allocation": "uniform",
            "eigen_dtype": "float64",
            "base_parameters": 6 * 4 + sum(rows * columns for rows, columns, *_ in layers.values()),
            "layers": records,
            "ignored_tensors": [],
        },
        weighting=WeightingRecord(damping=0.05, sensitivity=dict.fromkeys(layers, 1.5)) if weighted else None,
    )


def adapter(
    folder: Path,
    ranks: Mapping[str, int],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    corrected: bool = False,
    chosen: int | None = None,
) -> None:
    """LoRA pairs of 8 x 4 layers of the given ranks, and a head that was trained as a whole (`modules_to_save`).

    `chosen` is the place of the LoRA in `CANDIDATES` that was written, if it was chosen among them; then there is no
    such head.
    """
    folder.mkdir(parents=True)
    head = {"base_model.model.score.weight": values(3, 2, 4).to(dtype)} if chosen is None else {}
    tensors, scale = dict(head), 1.0 if chosen is None else CANDIDATES[chosen].scale
    for index, (module, rank) in enumerate(ranks.items()):
        tensors[f"base_model.model.{module}.lora_A.weight"] = values(20 + index, rank, 4).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (scale * values(40 + index, 8, rank)).to(dtype)
    full = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": "example/tiny-llama" if corrected else "outputs/emulator",
        "revision": REVISION if corrected else None,
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "modules_to_save": ["score"] if head else None,
        "bias": "none",
        **config,
    }
    if not corrected:
        specs = [TensorSpec(name, dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
        writer = ShardedWriter(folder, "adapter_model", specs, max_shard_size=LARGE, metadata={"format": "pt"})
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])
        writer.finish()
        write_json(folder / "adapter_config.json", full)
        return
    uncorrected = chosen is not None and CANDIDATES[chosen].adapter == "trained"
    layers, others = ([], list(ranks)) if uncorrected else (list(ranks)[:1], list(ranks)[1:])
    report = {"rank": 2, "scaling": 1.5, "directions": 2, "clamped": 0, "delta_norm": 0.25, "update_norm": 1.5}
    fields = {
        "made_by": MADE_BY,
        "base": base("LlamaForSequenceClassification" if head else "LlamaForCausalLM"),
        "emulator": content_hash(values(5, 4)),
        "trained_adapter": content_hash(values(6, 4)),
        "clamp": 3.0,
        "layers": dict.fromkeys(layers, report),
        "unchanged": list(head)
        + [f"base_model.model.{module}.lora_{side}.weight" for module in others for side in "AB"],
    }
    data = DataRecord(file="heldout.jsonl", hash=content_hash(values(7, 4)), samples=2, tokens=8, max_length=16, seed=0)
    selection = None if chosen is None else Selection(data=data, candidates=CANDIDATES, chosen=chosen)
    write_adapter(folder, full, tensors, fields=fields, selection=selection)


def diffusers_lora(
    folder: Path, *, metadata: Mapping[str, Any] | None, alpha: float | None = None, corrected: bool = False
) -> None:
    """Two pairs of a transformer's 8 x 4 layers of rank 2, perhaps the second's alpha, and a text encoder's pair."""
    folder.mkdir(parents=True)
    modules = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qk"]
    others = ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    tensors = {}
    for index, module in enumerate([*modules, *others]):
        tensors[f"{module}.lora_A.weight"] = values(20 + index, 2, 4)
        tensors[f"{module}.lora_B.weight"] = values(40 + index, 8, 2)
    if alpha is not None:
        tensors[f"{modules[1]}.alpha"] = torch.tensor(alpha)
    header = {"format": "pt"}
    if metadata is not None:
        header["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in metadata.items()})
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    trained = folder.with_name(f"{folder.name}-trained") if corrected else folder
    trained.mkdir(exist_ok=True)
    writer = ShardedWriter(trained, "pytorch_lora_weights", specs, max_shard_size=LARGE, metadata=header)
    for spec in specs:
        writer.write(spec.name, tensors[spec.name])
    writer.finish()
    if not corrected:
        return
    opened = DiffusersLora(trained)
    keys = opened.loras[modules[0].removeprefix("transformer.")]
    report = {"rank": 2, "scaling": keys.scaling, "directions": 2, "clamped": 0, "delta_norm": 0.25, "update_norm": 1.5}
    fields = {
        "made_by": MADE_BY,
        "base": base("FluxTransformer2DModel"),
        "emulator": content_hash(values(5, 4)),
        "trained_adapter": opened.hash,
        "clamp": 3.0,
        "layers": {modules[0].removeprefix("transformer."): report},
        "unchanged": [name for name in sorted(tensors) if name not in (keys.A, keys.B)],
    }
    opened.close()
    write_diffusers_lora(folder, opened, opened.config, tensors, fields=fields)
    shutil.rmtree(trained)


def refined(folder: Path, before: Path, losses: list[float]) -> None:
    """The corrected adapter in `before`, all of whose pairs moved a little, with as many steps as there are losses."""
    opened = open_adapter(before)
    record = Refinement(
        adapter=opened.hash,
        data=DataRecord(
            file="train.jsonl", hash=content_hash(values(8, 4)), samples=4, tokens=16, max_length=16, seed=0
        ),
        samples_per_step=2,
        step_size=0.125,
        losses=losses,
    )
    tensors = {name: opened.read(name) for name in opened.tensors.names()}
    for keys in opened.loras.values():
        tensors |= {key: tensors[key] * 1.25 for key in (keys.A, keys.B)}
    folder.mkdir(parents=True)
    assert opened.manifest is not None
    write_refined(folder, opened, tensors, record, base=opened.manifest.base, made_by=MADE_BY)
    opened.close()
