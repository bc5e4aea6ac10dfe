"""Build any transformers model without its weights: parameters on the meta device, buffers real."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models import diffusion
from emloc_tools.models.quantised.methods import require_readable
from emloc_tools.models.source import Source, first_line

# For inference RWKV halves its activations every few blocks, and at its first forward divides weights in place to make
# up for it. That changes the range of numbers alone; weights that are read later, and factors, cannot be divided.
RESCALING = "rescale_every"


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Code in the model's folder runs only with `trust_remote_code`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    of_diffusers = diffusion.read_config(source.folder, source.id)
    if of_diffusers is not None:
        return of_diffusers
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"{source.id}: its config.json cannot be used: {reason(error)}") from error
    require_readable(getattr(config, "quantization_config", None), source.id)
    return config


def model_class(config: Any, source: Source, *, trust_remote_code: bool = False) -> type[nn.Module]:
    """The class of `architectures[0]`, from transformers, or from the model's own code if that is trusted.

    Raises `InputError` for an emulator, `UnsupportedError` for a class that cannot be had.
    """
    import transformers

    if isinstance(config, diffusion.DiffusersConfig):
        return diffusion.diffusers_class(config.architecture, source.id)
    if getattr(config, "emloc", None):
        raise InputError(f"{source.id} is an emulator made by emloc-tools; give the model that it was made from")
    name = (getattr(config, "architectures", None) or [None])[0]
    if name is None:
        raise InputError(f'{source.id}: config.json names no architecture; add "architectures": ["<model class>"]')
    known = getattr(transformers, name, None)
    if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
        return cast(type[nn.Module], known)
    references = [str(reference) for reference in (getattr(config, "auto_map", None) or {}).values()]
    reference = next((reference for reference in references if reference.endswith("." + name)), None)
    if reference is None:
        raise UnsupportedError(f"{source.id}: transformers {transformers.__version__} has no model class {name}")
    if not trust_remote_code:
        raise UnsupportedError(
            f"{source.id}: {name} is code in the model's own folder; pass --trust-remote-code to run it"
        )
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return cast(type[nn.Module], get_class_from_dynamic_module(reference, str(source.folder)))


def reason(error: Exception) -> str:
    """Why transformers could not load something, in one line."""
    if "contains custom code" in str(error):
        return "it needs code in the model's own folder; pass --trust-remote-code to run it"
    return first_line(error)


def build_skeleton(cls: Any, config: Any, *, dtype: torch.dtype) -> nn.Module:
    """The model in evaluation mode with every parameter on meta, in `dtype` where the model lets it choose.

    What a class keeps in float32 beside fp16 or bf16, such as routing biases, is float32 here as well. Without an
    explicit `use_cache` the model keeps no cache: a single forward has no use for it. Nor does it rescale its weights.
    """
    with parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(config, diffusion.DiffusersConfig):
            return diffusion.build(cls, config, dtype).eval()
        model: nn.Module = cls._from_config(config, dtype=dtype).eval()
    kept = [*(_kept(model, "_keep_in_fp32_modules_strict") if dtype in (torch.float16, torch.bfloat16) else ())]
    kept += _kept(model, "_keep_in_fp32_modules") if dtype == torch.float16 else ()
    for name, parameter in model.named_parameters():
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept):
            parameter.data = parameter.data.float()
    _set(model, "use_cache", False)  # many classes take it only on to the part that knows it
    _set(model, RESCALING, 0)
    return model


def _set(model: nn.Module, setting: str, value: object) -> None:
    """Change a setting in the configurations of a model and its parts, where it is on."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, setting, False):
            setattr(config, setting, value)


def _kept(model: nn.Module, attribute: str) -> list[str]:
    return list(cast("list[str] | None", getattr(model, attribute, None)) or ())


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters on meta as modules register them; one that is registered twice stays one.

    `torch.device("meta")` would also put buffers there, such as rotary frequencies that no checkpoint holds.
    """
    original = nn.Module.register_parameter
    replaced: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            if parameter not in replaced:
                on_meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                on_meta.__dict__.update(parameter.__dict__)
                replaced[parameter] = on_meta
            module._parameters[name] = replaced[parameter]

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
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


def matches_pairs(architecture: str) -> bool:
    """Whether a model class of transformers has a loss of its own for pairs, such as of an image and its caption."""
    import transformers

    known: Any = getattr(transformers, architecture, None)
    return known is not None and "return_loss" in inspect.signature(known.forward).parameters


def predicts_next_token(architecture: str, config: Any = None) -> bool:
    """Whether a model class of transformers is a causal language model, of text alone or of images and text.

    Of a class that is code of the model's own, `config` tells by the Auto class that it loads by.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if architecture in set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    own = str((getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", ""))
    if own.endswith(f".{architecture}"):
        return True
    if architecture not in set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()):
        return False
    forward = getattr(transformers, architecture).forward
    return "decoder_input_ids" not in inspect.signature(forward).parameters  # those predict another text
