"""Calibrations with gradients of the loss, written without the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.stages.reference import read_json, tensor_hash, write_json


def with_gradients(
    plain: Path, folder: Path, gradients: dict[str, torch.Tensor], *, loss: str = "next-token", side: str = "output"
) -> Path:
    """A copy of a calibration with gradients `(tokens, features)` of some layers, written by hand."""
    shutil.copytree(plain, folder)
    manifest = read_json(folder / "calibration.json")
    tensors = {}
    for layer, g in gradients.items():
        G, n = g.T @ g, g.shape[1]
        name = f"{layer}.{side}_gradient_gram"
        tensors[name] = G[tuple(torch.tril_indices(n, n))]
        manifest["grams"].append(
            {
                "tensor": name,
                "side": f"{side}_gradient",
                "features": n,
                "tokens": g.shape[0],
                "layers": [layer],
                "hash": tensor_hash(tensors[name]),
                "energy": float((g**2).sum()),
            }
        )
    save_file(tensors, folder / "gradients.safetensors")
    manifest["shards"].append("gradients.safetensors")
    write_json(folder / "calibration.json", {**manifest, "format_version": 2, "loss": loss})
    return folder
