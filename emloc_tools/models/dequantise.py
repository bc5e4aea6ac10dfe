"""Which quantised checkpoints can be read as full-precision ones, and by what.

Those whose weights a formula or a library gives back, tensor by tensor: FP8 with scales (`fp8`), bitsandbytes in 4
and 8 bits (`bitsandbytes_weights`), and the MXFP4 of GPT-OSS (`mxfp4`). All others are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.bitsandbytes_weights import BitsandbytesFolder, is_bitsandbytes, require_bitsandbytes
from emloc_tools.models.fp8 import Fp8Folder, block_size, is_fp8
from emloc_tools.models.mxfp4 import Mxfp4Folder, is_mxfp4


def require_readable(quantisation: Any, base: str) -> None:
    """Refuse a `quantization_config` whose weights cannot be had in full precision."""
    if not quantisation:
        return
    known = (is_fp8, is_bitsandbytes, is_mxfp4)
    if isinstance(quantisation, Mapping) and any(is_known(quantisation) for is_known in known):
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
    raise UnsupportedError(
        f"{base} is quantised by {method or 'an unknown method'}; use the model's full-precision (bf16, fp16, fp32) "
        "release, or one in FP8, MXFP4 (GPT-OSS) or of bitsandbytes"
    )


def require_dequantiser(quantisation: Any, model: nn.Module, base: str) -> None:
    """Refuse what needs a library that is not installed, or layers that it stores in a way of its own."""
    if quantisation and is_bitsandbytes(quantisation):
        require_bitsandbytes(model, base)


def open_dequantised(tensors: TensorFolder, quantisation: Any, dtype: torch.dtype) -> TensorFolder:
    """The checkpoint as it is, or with its weights in `dtype` if its configuration says that they are quantised."""
    if not quantisation:
        return tensors
    if is_bitsandbytes(quantisation):
        return BitsandbytesFolder(tensors, dtype)
    if is_mxfp4(quantisation):
        return Mxfp4Folder(tensors, dtype)
    return Fp8Folder(tensors, block_size(quantisation), dtype)
