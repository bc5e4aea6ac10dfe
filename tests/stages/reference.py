"""What the stages' tests compare with: folders read without the package, Grams by plain hooks, PCA in float64."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass
class Moments:
    """What one linear layer read and wrote: `XᵀX`, `YᵀY` (outputs without bias), float64, and the tokens."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    tokens: int
    reads: int  # identity of the tensor that the layer read in the first sample


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer inside a list of blocks."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(name.startswith(f"{block}.") for block in blocks)
    }


def weight_of(module: nn.Module) -> torch.Tensor:
    """W (out, in), float64."""
    weight = module.weight.detach().double()
    return weight.T if isinstance(module, Conv1D) else weight


def moments(model: nn.Module, samples: list[list[int]], *extra: str) -> dict[str, Moments]:
    """Run every sample by itself through a float64 copy of the model, so that nothing is padded, and sum up.

    Sees the linear layers of all blocks, and those named by `extra`.
    """
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # fused experts have no float64 kernel
    found: dict[str, Moments] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            X = args[0].reshape(-1, args[0].shape[-1])
            Y = X @ weight_of(module).T
            if name not in found:
                kept.append(args[0])  # or its memory could serve the next tensor
                found[name] = Moments(X.T @ X, Y.T @ Y, X.shape[0], args[0].data_ptr())
            else:
                found[name].inputs += X.T @ X
                found[name].outputs += Y.T @ Y
                found[name].tokens += X.shape[0]

        return see

    kept: list[torch.Tensor] = []
    seen = {**linears(model), **{name: model.get_submodule(name) for name in extra}}
    handles = [module.register_forward_hook(hook(name)) for name, module in seen.items()]
    with torch.no_grad():
        for sample in samples:
            model(input_ids=torch.tensor([sample]))
    for handle in handles:
        handle.remove()
    return found


def principal(W: torch.Tensor, outputs: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of W (out, in) of a rank, given `YᵀY` of its outputs, and all energies, descending."""
    energies, U = torch.linalg.eigh(outputs)
    U = U.flip(1)[:, :rank]
    return U @ U.T @ W, energies.flip(0).clamp(min=0)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files in a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def read_grams(folder: Path) -> dict[str, tuple[str, int, torch.Tensor, str]]:
    """Per layer of a calibration folder: side, tokens, the whole Gram in float64, and the name of its tensor."""
    tensors, grams = read_tensors(folder), {}
    for record in read_json(folder / "calibration.json")["grams"]:
        assert record["side"] in ("input", "output"), "gradients would replace the data's Grams here"
        n = record["features"]
        rows, columns = torch.tril_indices(n, n)
        G = torch.zeros(n, n, dtype=torch.float64)
        G[rows, columns] = tensors[record["tensor"]].double()
        G = G + G.tril(-1).T
        grams |= dict.fromkeys(record["layers"], (record["side"], record["tokens"], G, record["tensor"]))
    return grams


def tensor_hash(tensor: torch.Tensor) -> str:
    """The content hash of a tensor: over its dtype and shape as safetensors spells them, and its bytes."""
    head = f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode()
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"xxh3_128:{xxhash.xxh3_128(head + data).hexdigest()}"


def bytes_hash(path: Path) -> str:
    """The hash of a file."""
    return f"xxh3_128:{xxhash.xxh3_128(path.read_bytes()).hexdigest()}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def close_to(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
