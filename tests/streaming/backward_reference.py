"""Gradients at linear layers by autograd on a model in memory, and by the streamed backward, in the same form."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.base import open_base
from emloc_tools.models.layers import select_layers
from emloc_tools.models.skeleton import parameters_on_meta
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import Layer
from emloc_tools.streaming.backward import BackwardLockStep
from emloc_tools.streaming.gradients import Gradient
from tests.streaming.streamed import batches

EXACT = 1e-11  # float64, up to the order of sums

Calls = Sequence[Callable[[], Any]]
Loss = Callable[[int, Any], torch.Tensor]


@dataclass
class Gradients:
    """By batch and layer, one entry per call of the layer, the last call first: rows, and squared norms of g."""

    rows: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)
    squares: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    def add(self, batch: int, layer: str, rows: torch.Tensor, squares: torch.Tensor) -> None:
        self.rows.setdefault((batch, layer), []).append(rows.clone())
        self.squares.setdefault((batch, layer), []).append(squares.clone())


def reference(model: nn.Module, layers: Sequence[Layer], calls: Calls, loss: Loss) -> Gradients:
    """g at every layer's output by plain autograd, and for layers with out > in the product g W."""
    found = Gradients()
    batch = 0

    def hook(layer: Layer) -> Callable[..., torch.Tensor]:
        def see(g: torch.Tensor, weight: torch.Tensor) -> None:
            wide = layer.out_features > layer.in_features
            W = weight.T if layer.orientation == "conv1d" else weight
            found.add(batch, layer.name, g @ W if wide else g, (g.double() ** 2).sum(-1))

        def tap(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            copy = output.clone()  # whatever the model does to it in place comes after the hook
            if copy.requires_grad:
                copy.register_hook(lambda g: see(g, module.weight.detach()))  # type: ignore[union-attr, arg-type]
            return copy

        return tap

    handles = [model.get_submodule(layer.name).register_forward_hook(hook(layer)) for layer in layers]
    for batch, call in enumerate(calls):
        value = loss(batch, call())
        found.losses[batch] = value.item()
        value.backward()
    for handle in handles:
        handle.remove()
    return found


def collect(stream: BackwardLockStep, calls: Calls, loss: Loss) -> Gradients:
    """The same by the streamed backward."""
    found = Gradients()

    def add(batch: int, gradient: Gradient) -> None:
        found.add(batch, gradient.layer, gradient.rows, gradient.squares)

    stream.on_gradient = add
    stream.run_backward(calls, loss, lambda batch, value: found.losses.__setitem__(batch, value.item()))
    return found


def distance(one: Gradients, other: Gradients) -> float:
    """The largest relative difference of any rows or squares, infinite if calls are missing. Zero rows must be zero.

    Relative to the largest entry of the batch: gradients that vanish analytically hold rounding errors only.
    """
    if set(one.rows) != set(other.rows) or set(one.losses) != set(other.losses):
        return float("inf")
    worst = max(abs(one.losses[batch] - other.losses[batch]) for batch in other.losses)
    for mine, theirs in ((one.rows, other.rows), (one.squares, other.squares)):
        scale: dict[int, float] = {}
        for (batch, _), tensors in theirs.items():
            scale[batch] = max([scale.get(batch, 0.0), *(float(tensor.abs().max()) for tensor in tensors)])
        for key, tensors in theirs.items():
            if [tensor.shape for tensor in mine[key]] != [tensor.shape for tensor in tensors]:
                return float("inf")
            for a, b in zip(mine[key], tensors, strict=True):
                worst = max(worst, float((a.double() - b.double()).abs().max()) / (scale[key[0]] or 1.0))
    return worst


def open_backward(
    folder: Path, *, targets: str | None = ".", dtype: str = "float64", **options: Any
) -> tuple[BackwardLockStep, list[Layer]]:
    """A saved transformers model, ready to stream; by default with every linear layer, in float64."""
    opened = open_base(str(folder), dtype=dtype)
    layers = [layer for layer in select_layers(opened.model, targets=targets) if layer.experts is None]
    return BackwardLockStep(opened.model, opened.weights(), layers, spill=folder, **options), layers


def family_in_memory(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The same model in memory, computed in the same dtype from the same stored weights."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()


def stream_module_backward(
    make: Callable[[], nn.Module], folder: Path, **options: Any
) -> tuple[nn.Module, BackwardLockStep, list[Layer]]:
    """A plain module in memory with random float64 weights, the same one streamed, and all its linear layers.

    In memory gradients start at the parameters of `embed` alone: those of other weights would need their layers'
    inputs, and forbid to change these in place.
    """
    model = make().double().eval().requires_grad_(False)
    model.embed.requires_grad_(True)  # type: ignore[union-attr, operator]
    save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, folder / "m.safetensors")
    with parameters_on_meta():
        skeleton = make().double().eval()
    layers = select_layers(skeleton, targets=".")
    weights = ModelWeights(skeleton, TensorFolder.of_files([folder / "m.safetensors"]))
    return model, BackwardLockStep(skeleton, weights, layers, spill=folder, **options), layers


def calls(model: Any) -> Calls:
    """Forwards with labels at every position, padding included, so that padded rows have gradients as well."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def call(inputs: dict[str, torch.Tensor]) -> Any:
        return lambda: model(**inputs, labels=inputs["input_ids"], **options)

    return [call(inputs) for inputs in batches()]


def loss(batch: int, output: Any) -> torch.Tensor:
    return output.loss  # type: ignore[no-any-return]


def count_reads(stream: BackwardLockStep) -> Counter[str]:
    """How often each checkpoint tensor is read from now on."""
    counts: Counter[str] = Counter()
    tensors = stream.weights.tensors
    read = tensors.read

    def counting(name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        counts[name] += 1
        return read(name, buffer)

    tensors.read = counting  # type: ignore[method-assign]
    return counts
