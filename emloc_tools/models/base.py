"""A base model opened for reading: its files, configuration, skeleton on meta, and weights by name."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import InputError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.diffusion import DiffusersConfig, stored_dtype
from emloc_tools.models.quantised.folder import DequantisedFolder
from emloc_tools.models.quantised.methods import open_dequantised, require_dequantiser
from emloc_tools.models.skeleton import build_skeleton, compute_dtype, load_config, model_class
from emloc_tools.models.source import Source, first_line, open_source, open_tensors
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import Layer, Library


@dataclass(frozen=True)
class BaseModel:
    """What a stage needs to know of a base model; no weight is in memory."""

    source: Source
    config: Any
    architecture: str
    model: nn.Module
    tensors: TensorFolder

    @property
    def library(self) -> Library:
        """The library that the model's class belongs to."""
        return "diffusers" if isinstance(self.config, DiffusersConfig) else "transformers"

    @property
    def dequantised(self) -> bool:
        """Whether the checkpoint is quantised, and read as full precision: then so is what is made of it."""
        return isinstance(self.tensors, DequantisedFolder)

    @property
    def has_own_code(self) -> bool:
        """Whether the model's class is code in its folder, and not one of its library."""
        return type(self.model).__module__.startswith("transformers_modules.")

    def weights(self, layers: Collection[Layer] = ()) -> ModelWeights:
        """The checkpoint by model names; hashes of the given layers' weights are collected as they are read."""
        return ModelWeights(self.model, self.tensors, hashed=[weight_name(layer) for layer in layers])


def open_base(
    base: str, *, revision: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> BaseModel:
    """Open a local folder or a Hub id; see `source.open_source`. The skeleton computes in `dtype`.

    What can be refused is refused before any weight is fetched.
    """
    source = open_source(base, revision=revision, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    cls = model_class(config, source, trust_remote_code=trust_remote_code)
    if isinstance(config, DiffusersConfig):
        tensors = open_tensors(source, "diffusers")
        config = replace(config, dtype=stored_dtype(tensors))
        model = build_skeleton(cls, config, dtype=compute_dtype(config, dtype))
        return BaseModel(source, config, cls.__name__, model, tensors)
    # Read as full precision, the model is built as that. What it is read in does not depend on what it computes in.
    quantisation = vars(config).pop("quantization_config", None)
    model = build_skeleton(cls, config, dtype=compute_dtype(config, dtype))
    require_dequantiser(quantisation, model, source.id)
    tensors = open_dequantised(open_tensors(source), quantisation, compute_dtype(config))
    return BaseModel(source, config, cls.__name__, model, tensors)


def weight_name(layer: Layer) -> str:
    """The name of a layer's weight in the model; a stack of experts is a parameter itself."""
    return layer.name if layer.experts else f"{layer.name}.weight"


def oriented(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """A stored weight as `W (out, in)`: the transpose of a Conv1D's. That of a stack has the experts in front."""
    return weight.mT if layer.orientation == "conv1d" else weight


def choose_device(device: str) -> str:
    """`auto` is the first CUDA device, else the CPU. Raises `InputError` for a device that cannot be used."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known = re.fullmatch(r"cpu|(cuda|xpu|mps)(:\d+)?", device)
        reason = first_line(error) if known else "expected auto, cpu, cuda, cuda:1, ..."
        raise InputError(f"--device {device} cannot be used here: {reason}; --device cpu works everywhere") from error
    return device
