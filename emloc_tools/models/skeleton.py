"""Build any transformers model without its weights: parameters on the meta device, buffers real."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.source import Source


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Code in the model's folder runs only with `trust_remote_code`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{source.id}: its config.json cannot be used: {first}") from error
    if getattr(config, "quantization_config", None):
        raise UnsupportedError(f"{source.id} is quantised; use the model's full-precision (bf16, fp16, fp32) release")
    return config


def model_class(config: Any, source: Source, *, trust_remote_code: bool = False) -> type[nn.Module]:
    """The class of `architectures[0]`, from transformers, or from the model's own code if that is trusted."""
    import transformers

    name = (getattr(config, "architectures", None) or [None])[0]
    if name is None:
        raise InputError(f'{source.id}: config.json names no architecture; add "architectures": ["<model class>"]')
    known = getattr(transformers, name, None)
    if known is not None:
        return known  # type: ignore[no-any-return]
    reference = next((ref for ref in getattr(config, "auto_map", {}).values() if str(ref).endswith("." + name)), None)
    if reference is None:
        raise UnsupportedError(f"{source.id}: transformers {transformers.__version__} does not know {name}")
    if not trust_remote_code:
        raise UnsupportedError(
            f"{source.id}: {name} is code in the model's own folder; pass --trust-remote-code to run it"
        )
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, str(source.folder))  # type: ignore[no-any-return]


def build_skeleton(cls: type[nn.Module], config: Any, *, dtype: torch.dtype) -> nn.Module:
    """The model in evaluation mode with every parameter on meta, in `dtype` where the model lets it choose."""
    with parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls._from_config(config, dtype=dtype).eval()  # type: ignore[attr-defined, no-any-return]


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters on meta as modules register them.

    `torch.device("meta")` would also put buffers there, such as rotary frequencies that no checkpoint holds.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            on_meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            on_meta.__dict__.update(parameter.__dict__)
            module._parameters[name] = on_meta

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def compute_dtype(config: Any, requested: str = "auto") -> torch.dtype:
    """The dtype to run a model in: the requested one, else the one that its configuration names, else float32."""
    if requested != "auto":
        return getattr(torch, requested)  # type: ignore[no-any-return]
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
