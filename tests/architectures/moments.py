"""Second moments of layers' data and gradients: as a calibration stores them, and by plain hooks in memory."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.architectures.family import Inputs
from tests.architectures.journey import read_json, read_tensors

Grams = dict[str, torch.Tensor]
Sides = dict[str, str]
See = Callable[[str, nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def stored_grams(folder: Path, suffix: str = "") -> tuple[Grams, Sides]:
    """The Grams of a calibration by layer, whole and in float64, and the sides on which they were taken.

    Those of the data, or with the suffix `_gradient` those of the loss gradient.
    """
    tensors = read_tensors(folder)
    grams: Grams = {}
    sides: Sides = {}
    for record in read_json(folder / "calibration.json")["grams"]:
        side, _, kind = record["side"].partition("_")
        if kind == suffix.removeprefix("_"):
            n = record["features"]
            rows, columns = torch.tril_indices(n, n)
            G = torch.zeros(n, n, dtype=torch.float64)
            G[rows, columns] = tensors[record["tensor"]].double()
            grams |= dict.fromkeys(record["layers"], G + G.tril(-1).T)
            sides |= dict.fromkeys(record["layers"], side)
    return grams, sides


def grams_in_memory(model: nn.Module, batches: list[Inputs], sides: Sides) -> Grams:
    """The Grams of what layers read, or of their outputs without bias, when `model` runs every sample unpadded."""
    grams: Grams = {}

    def see(name: str, module: nn.Module, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if sides[name] == "input":
            add(grams, name, X)
        else:
            add(grams, name, y if module.bias is None else X.float() @ weight_of(module).float().T)
        return y

    writes = getattr(model.config, "is_encoder_decoder", False)
    with watching(model, sides, see), torch.no_grad():
        for batch in batches:
            for inputs in without_padding(batch, writes):
                run(model, inputs)
    return grams


def gradients_in_memory(model: nn.Module, batches: list[Inputs], layers: list[str]) -> Grams:
    """The Grams of autograd's gradient g at the layers' outputs; of Wᵀg where a layer has more outputs than inputs.

    Padding needs no care: no gradient arrives there.
    """
    grams: Grams = {}

    def see(name: str, module: nn.Module, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        W = weight_of(module).detach()
        copy = y.clone()  # what the model does to its copy in place comes after the hook
        copy.register_hook(lambda g: add(grams, name, g @ W if W.shape[0] > W.shape[1] else g))
        return copy

    with watching(model, layers, see):
        for batch in batches:
            run(model, batch, loss=True)["loss"].backward()
    return grams


def without_padding(inputs: Inputs, writes: bool) -> list[Inputs]:
    """The samples of a padded batch one by one and without their padding; a batch without padding as it is.

    Labels of a model that `writes` belong to its decoder, and are not padded where the mask says so.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return [inputs]
    padded = {name for name, value in inputs.items() if value.shape[:2] == mask.shape} - (
        {"labels"} if writes else set()
    )
    samples = []
    for row, real in enumerate(mask.bool()):
        sample = {name: value[row : row + 1] if len(value) == len(mask) else value for name, value in inputs.items()}
        samples.append({name: value[:, real] if name in padded else value for name, value in sample.items()})
        del samples[-1]["attention_mask"]
        if writes:  # the labels' own padding
            samples[-1]["labels"] = sample["labels"][:, sample["labels"][0] != -100]
    return samples


def run(model: nn.Module, inputs: Inputs, *, loss: bool = False) -> Any:
    """A forward without a cache, which would only cost, and with a loss if it is wanted."""
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False, **({"return_loss": True} if loss else {})}
    return model(**inputs, **{name: value for name, value in options.items() if name in accepted})


def weight_of(module: nn.Module) -> torch.Tensor:
    """W (out, in)."""
    weight: Any = module.weight
    return weight.T if isinstance(module, Conv1D) else weight  # type: ignore[no-any-return]


def add(grams: Grams, name: str, rows: torch.Tensor) -> None:
    """Add the Gram of `rows (..., features)`."""
    rows = rows.detach().reshape(-1, rows.shape[-1]).double()
    grams[name] = grams.get(name, 0) + rows.T @ rows


@contextlib.contextmanager
def watching(model: nn.Module, layers: Any, see: See) -> Iterator[None]:
    """Call `see` with the name, module, input and output of the layers; what it returns replaces the output."""

    def hook(name: str) -> Callable[..., torch.Tensor]:
        return lambda module, args, kwargs, y: see(name, module, args[0] if args else next(iter(kwargs.values())), y)

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest ‖found − expected‖ / ‖expected‖; infinite if the names differ.

    Tensors that vanish beside the largest one hold nothing but rounding errors, and are measured by that one.
    """
    if found.keys() != expected.keys():
        return float("inf")
    norms = {name: float(tensor.double().norm()) for name, tensor in expected.items()}
    least = 1e-6 * max(norms.values())
    return max(
        float((found[name].double() - expected[name].double()).norm()) / max(norm, least, 1e-30)
        for name, norm in norms.items()
    )
