"""The base that a plan is about: its configuration, and skeletons of it and of its emulators, as many as are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from emloc_tools.files.emulator import STEMS
from emloc_tools.models.diffusion import DiffusersConfig, stored_dtype
from emloc_tools.models.lowrank_modules import factor_layers
from emloc_tools.models.skeleton import build_skeleton, compute_dtype, load_config, model_class
from emloc_tools.models.source import Source, open_source, open_tensors
from emloc_tools.records import Library


@dataclass(frozen=True)
class Subject:
    """A base of which small files alone are there. `dtype` is that of its frozen weights in training."""

    source: Source
    config: Any
    cls: type[nn.Module]
    dtype: torch.dtype

    @property
    def library(self) -> Library:
        """The library that the model's class belongs to."""
        return "diffusers" if isinstance(self.config, DiffusersConfig) else "transformers"

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the weights on disk; full precision where they are quantised."""
        return compute_dtype(self.config)

    def skeleton(self, ranks: Mapping[str, int] | None = None) -> nn.Module:
        """A new model on meta as it is trained; with `ranks`, the emulator that has them."""
        model = build_skeleton(self.cls, self.config, dtype=self.dtype)
        if ranks:
            factor_layers(model, dict(ranks))
        return model

    def as_stored(self) -> nn.Module:
        """A new model on meta as it is on disk."""
        return build_skeleton(self.cls, self.config, dtype=self.stored_dtype)


def open_subject(base: str, *, revision: str | None, dtype: str, trust_remote_code: bool) -> Subject:
    """A folder or a Hub id, of which no weights are fetched. Raises what `open_base` does."""
    source = open_source(base, revision=revision, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    cls = model_class(config, source, trust_remote_code=trust_remote_code)
    if isinstance(config, DiffusersConfig):
        config = replace(config, dtype=_dtype_of_diffusers(source))
    else:
        vars(config).pop("quantization_config", None)  # it is trained, and its emulator made, in full precision
    return Subject(source, config, cls, compute_dtype(config, dtype))


def _dtype_of_diffusers(source: Source) -> torch.dtype:
    """That of the weights in a local folder; of the Hub none are fetched, and these models are published in bf16."""
    stem = STEMS["diffusers"]
    if not any((source.folder / f"{stem}.safetensors{index}").is_file() for index in ("", ".index.json")):
        return torch.bfloat16
    with open_tensors(source, "diffusers") as tensors:
        return stored_dtype(tensors)
