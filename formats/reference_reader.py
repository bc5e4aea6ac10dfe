"""Read the three formats with NumPy and the standard library: `python formats/reference_reader.py FOLDER`.

A second implementation of what `*/SPEC.md` says, to read beside it. It trusts the folder: it checks neither hashes
(XXH3 is not in the standard library) nor most rules.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "F8_E4M3": "u1", "F8_E5M2": "u1"}

DESCRIPTION = "lora_adapter_metadata"


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors and the metadata of one file. BF16 comes as float32; 8-bit floats as their bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin = 8 + length + entry["data_offsets"][0]
        values = np.frombuffer(data, DTYPES[entry["dtype"]], prod(entry["shape"]), begin)
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (values.astype("<u4") << 16).view("<f4")
        tensors[name] = values.reshape(entry["shape"])
    return tensors, metadata


def read_shards(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The tensors of several files."""
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= read_safetensors(folder / name)[0]
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def read_manifest(path: Path, kind: str, newest: int) -> dict[str, Any]:
    """A manifest of version 1 to `newest`."""
    manifest = read_json(path)
    name, version = manifest["format"], manifest["format_version"]
    if name != f"emloc-{kind}" or version not in range(1, newest + 1):
        raise SystemExit(f"{path} is {name} {version}; this program reads emloc-{kind} up to {newest}")
    return manifest


def unpack(packed: np.ndarray, n: int) -> np.ndarray:
    """The symmetric (n, n) matrix of a packed lower triangle."""
    G: np.ndarray = np.zeros((n, n), packed.dtype)
    G[np.tril_indices(n)] = packed  # row by row: (0,0), (1,0), (1,1), (2,0), ...
    G += np.tril(G, -1).T
    return G


def read_calibration(folder: Path) -> dict[tuple[str, str], tuple[int, np.ndarray, float | None]]:
    """Per layer and side: number of tokens, the Gram summed over them, and the energy if it is of a gradient.

    The sides are `input` or `output`, of which every layer has one, `input_gradient` and `output_gradient`.
    """
    manifest = read_manifest(folder / "calibration.json", "calibration", 4)
    tensors = read_shards(folder, manifest["shards"])
    return {
        (layer, gram["side"]): (gram["tokens"], unpack(tensors[gram["tensor"]], gram["features"]), gram.get("energy"))
        for gram in manifest["grams"]
        for layer in gram["layers"]
    }


def read_emulator(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`W_E` in float64 of every factored layer (out, in) and stack (experts, out, in); and all other tensors."""
    manifest = read_manifest(folder / "emulator.json", "emulator", 5)
    single = f"{'diffusion_pytorch_model' if 'library' in manifest else 'model'}.safetensors"
    index = folder / f"{single}.index.json"
    shards = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [single]
    others = read_shards(folder, shards)
    weights = {}
    names = [(layer, ".", f"{layer}.weight") for layer in manifest["layers"]]
    for name, separator, guard in names + [(stack, "_", stack) for stack in manifest.get("experts", {})]:
        U, S, Vh = (others.pop(f"{name}{separator}{factor}").astype(np.float64) for factor in ("U", "S", "Vh"))
        weights[name] = (U * S[..., None, :]) @ Vh  # also for conv1d, whose own weight would be the transpose
        others.pop(guard, None)
    return weights, others


def read_adapter(folder: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, float]], bool]:
    """`A (r, in)`, `B (out, r)` and the scaling of every adapted module; and whether the adapter was corrected."""
    peft = (folder / "adapter_config.json").exists()  # else in the file of diffusers, which may hold all of it
    name = "adapter_model" if peft else "pytorch_lora_weights"
    tensors, metadata = read_safetensors(folder / f"{name}.safetensors")
    described = read_json(folder / "adapter_config.json") if peft else json.loads(metadata.get(DESCRIPTION, "{}"))
    pairs = {}
    for key, A in tensors.items():
        if match := re.fullmatch(r"(base_model\.model|(?:transformer|unet)(?:_\d+)?)\.(.+)\.lora_A\.weight", key):
            place, module = match.groups()
            config = {entry.removeprefix(f"{place}."): value for entry, value in described.items()}
            given = tensors.get(f"{place}.{module}.alpha", len(A))
            rank = special(config.get("rank_pattern"), module, config.get("r", len(A)))
            alpha = special(config.get("alpha_pattern"), module, config.get("lora_alpha", float(given)))
            scaling = alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank
            pairs[module] = (A, tensors[key.replace("lora_A", "lora_B")], scaling)
    if (folder / "emloc.json").exists():
        read_manifest(folder / "emloc.json", "adapter", 4)
    return pairs, "emloc" in metadata


def special(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that means the module."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def main() -> None:
    """Print what a folder holds."""
    folder = Path(sys.argv[1])
    if (folder / "calibration.json").exists():
        for (layer, side), (tokens, G, energy) in read_calibration(folder).items():
            energy = np.trace(G) if energy is None else energy
            print(f"{layer}: {side} Gram {G.shape}, {tokens} tokens, energy per token {energy / tokens:.6g}")
    elif (folder / "emulator.json").exists():
        for layer, W in read_emulator(folder)[0].items():
            print(f"{layer}: emulated weight {W.shape}, norm {np.linalg.norm(W):.6g}")
    else:
        pairs, corrected = read_adapter(folder)
        print("corrected" if corrected else "as trained")
        for module, (A, B, scaling) in pairs.items():
            update = scaling * B.astype(np.float64) @ A
            print(f"{module}: rank {A.shape[0]}, scaling {scaling:.6g}, norm {np.linalg.norm(update):.6g}")


if __name__ == "__main__":
    main()
