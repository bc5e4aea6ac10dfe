"""Models of diffusers: where a pipeline holds its denoiser, and how such a model is built without its weights.

diffusers is an extra that only these models need, so it is imported here on first use.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import FormatError, InputError, UnsupportedError
from emloc_tools.files.emulator import QUANT_METHOD
from emloc_tools.files.json_files import read_json
from emloc_tools.files.tensors import TensorFolder

PIPELINE = "model_index.json"
CLASS = "_class_name"
DENOISER = re.compile(r"(transformer|unet)(_\d+)?")  # what a LoRA is trained on; text encoders are transformers' models
REMEDY = 'install it with `pip install "emloc-tools[diffusers]"` (Python 3.11 or later)'


@dataclass(frozen=True)
class DiffusersConfig:
    """The configuration of a model of diffusers, with what stages ask the configurations of transformers for.

    `values` are those of config.json. `dtype` is that of the stored weights, which config.json does not name.
    """

    architecture: str
    values: dict[str, Any]
    dtype: torch.dtype | None = None

    def get_text_config(self) -> DiffusersConfig:
        """Itself: it has no part for text, no vocabulary and no positions."""
        return self


def denoiser_of(pipeline: Path, base: str) -> str:
    """The sub-folder of a pipeline's only denoiser. Raises `InputError` where there are several, or none."""
    try:
        index = read_json(pipeline / PIPELINE, "pipeline")
    except FormatError as error:
        raise InputError(str(error)) from error
    components = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    found = [name for name in components if DENOISER.fullmatch(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{base} is a pipeline with {', '.join(found)}; name one of them, such as {base}/{found[0]}")
    parts = ", ".join(components) or "nothing"
    raise InputError(f"{base} is a pipeline of {parts}; name the model itself, such as {base}/transformer")


def read_config(folder: Path, base: str) -> DiffusersConfig | None:
    """The configuration in a folder if diffusers wrote it, else None.

    Raises `InputError` for an emulator, `UnsupportedError` for a quantised model.
    """
    try:
        values = read_json(folder / "config.json", "base config")
    except FormatError:
        return None  # transformers says what is wrong with it
    name = values.get(CLASS)
    if not isinstance(name, str) or "model_type" in values:
        return None
    quantised = values.get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") == QUANT_METHOD:
        raise InputError(f"{base} is an emulator made by emloc-tools; give the model that it was made from")
    if quantised:
        raise UnsupportedError(f"{base} is quantised; use the model's full-precision (bf16, fp16, fp32) release")
    return DiffusersConfig(name, values)


def diffusers_class(name: str, base: str) -> type[nn.Module]:
    """The model class of diffusers. Raises `UnsupportedError` if it, or diffusers, is not there."""
    diffusers = import_diffusers(f"{base} is a {name} of diffusers")
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise UnsupportedError(f"{base}: diffusers {diffusers.__version__} has no model class {name}")
    return found


def import_diffusers(why: str) -> Any:
    """The library. Where it is not installed, an `UnsupportedError` says `why` it is needed and names the extra."""
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError(f"{why}, which needs the extra `diffusers`: {REMEDY}") from error
    return diffusers


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of the libraries that load a pipeline's parts."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [log for log in (of_diffusers, of_transformers) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def build(cls: Any, config: DiffusersConfig, dtype: torch.dtype) -> nn.Module:
    """The model with random weights in `dtype`; what a class keeps in float32 is float32 here as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: nn.Module = cls.from_config(config.values)
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()
    return model


def stored_dtype(tensors: TensorFolder) -> torch.dtype:
    """The dtype of a checkpoint's first tensor of floating point; one file is opened for it."""
    dtypes = (tensors.spec(name).dtype for name in tensors.weight_map)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
