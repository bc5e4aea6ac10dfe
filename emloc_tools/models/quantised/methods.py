"""Which quantised checkpoints can be read as full-precision ones, and by what.

Those whose weights a formula or a library gives back, tensor by tensor. All others are refused by name; docs/bases.md
has the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.quantised.awq import AwqFolder, is_awq
from emloc_tools.models.quantised.bitsandbytes_weights import BitsandbytesFolder, is_bitsandbytes
from emloc_tools.models.quantised.compressed_tensors_schemes import extras, is_compressed_tensors
from emloc_tools.models.quantised.compressed_tensors_weights import CompressedTensorsFolder
from emloc_tools.models.quantised.fp8 import Fp8Folder, block_size, is_fp8
from emloc_tools.models.quantised.gptq import GptqFolder, is_gptq
from emloc_tools.models.quantised.mxfp4 import Mxfp4Folder, is_mxfp4
from emloc_tools.models.quantised.torchao_weights import TorchaoFolder, is_torchao

KNOWN = (is_fp8, is_bitsandbytes, is_mxfp4, is_gptq, is_awq, is_torchao, is_compressed_tensors)
# What tells variants of a method apart.
VARIANTS = ("quant_algo", "checkpoint_format", "version", "format", "packing_format", "expert_dtype", "bits")


def require_readable(quantisation: Any, base: str) -> None:
    """Refuse a `quantization_config` whose weights cannot be had in full precision."""
    if not quantisation:
        return
    if isinstance(quantisation, Mapping) and any(is_known(quantisation) for is_known in KNOWN):
        return
    raise UnsupportedError(
        f"{base} is quantised by {_called(quantisation)}; use the model's full-precision (bf16, fp16, fp32) release, "
        "or one in FP8, MXFP4 (GPT-OSS) or of GPTQ, AWQ, compressed-tensors, bitsandbytes or torchao"
    )


def require_dequantiser(quantisation: Any, model: nn.Module, base: str) -> None:
    """Refuse what needs a library that is not installed, or layers that a method stores in a way of its own."""
    if not quantisation:
        return
    from transformers.pytorch_utils import Conv1D

    transposes = is_bitsandbytes(quantisation) or is_gptq(quantisation) or is_awq(quantisation)
    if transposes and any(isinstance(module, Conv1D) for module in model.modules()):
        raise UnsupportedError(
            f"{base} is quantised by {quantisation.get('quant_method') or 'bitsandbytes'}, which stores Conv1D layers "
            "transposed; use the model's full-precision (bf16, fp16, fp32) release"
        )
    if is_bitsandbytes(quantisation):
        _require_extra("bitsandbytes", base)
    elif is_compressed_tensors(quantisation) and not is_fp8(quantisation):
        _require_extra("compressed-tensors", base)


def open_dequantised(tensors: TensorFolder, quantisation: Any, dtype: torch.dtype) -> TensorFolder:
    """The checkpoint as it is, or with its weights in `dtype` if its configuration says that they are quantised."""
    if not quantisation:
        return tensors
    if is_bitsandbytes(quantisation):
        return BitsandbytesFolder(tensors, dtype)
    if is_mxfp4(quantisation):
        return Mxfp4Folder(tensors, dtype)
    if is_gptq(quantisation):
        return GptqFolder(tensors, quantisation, dtype)
    if is_awq(quantisation):
        return AwqFolder(tensors, quantisation, dtype)
    if is_torchao(quantisation):
        return TorchaoFolder(tensors, dtype)
    if is_fp8(quantisation):
        return Fp8Folder(tensors, block_size(quantisation), dtype)
    return CompressedTensorsFolder(tensors, quantisation, dtype)


def _require_extra(extra: str, base: str) -> None:
    if not _is_installed(extra.replace("-", "_")):
        raise UnsupportedError(
            f"{base} is quantised in a way that {extra} reads, which is an extra: install it with "
            f'`pip install "emloc-tools[{extra}]"`'
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # it was put into sys.modules without a specification
        return False


def _called(quantisation: Any) -> str:
    """The method and what is known of its variant."""
    if not isinstance(quantisation, Mapping):
        return "an unknown method"
    variant = {key: quantisation[key] for key in VARIANTS if isinstance(quantisation.get(key), (str, int))}
    known = ", ".join(f"{key} {value}" for key, value in {**variant, **extras(quantisation)}.items())
    return f"{quantisation.get('quant_method') or 'an unknown method'}{known and f' ({known})'}"
