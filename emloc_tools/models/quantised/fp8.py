"""FP8 checkpoints read as full-precision ones: each 8-bit weight is multiplied by its scales as it is read.

Three layouts of scales are in use: one for the whole weight, one for each row, or a grid of one for each block, such as
128 x 128. They stand beside the weight as `<weight>_scale_inv` (DeepSeek, Qwen, MiniMax; a factor in spite of its name)
or `<weight>_scale` (compressed-tensors, FBGEMM, ModelOpt). The products are taken in float32 and rounded to the dtype
that the model's configuration names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.quantised.compressed_tensors_schemes import extras, groups_of
from emloc_tools.models.quantised.folder import DequantisedFolder, without

SUFFIXES = ("_scale_inv", "_scale")
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
# What a runtime needs that computes in FP8 as well: scales of activations and of cached keys and values.
OF_ACTIVATIONS = re.compile(r".*[._](input|output|activation|act|k|v|q)_scale(_inv)?", re.ASCII)


class Fp8Folder(DequantisedFolder):
    """The tensors of an FP8 checkpoint in `dtype`, without the scales, read one at a time.

    `block (rows, columns)` is the size of the blocks where scales form a grid; without it blocks divide the weight
    evenly. Raises `UnsupportedError` for an 8-bit tensor without scales, `MismatchError` for scales that do not fit.
    """

    def __init__(self, raw: TensorFolder, block: tuple[int, int] | None, dtype: torch.dtype) -> None:
        scales = {
            name: name + suffix for name in raw.weight_map for suffix in SUFFIXES if name + suffix in raw.weight_map
        }
        hidden = set(scales.values()) | {name for name in raw.weight_map if OF_ACTIVATIONS.fullmatch(name)}
        super().__init__(raw, without(raw.weight_map, hidden), dtype)
        self._scales, self._block = scales, block

    def quantised_shape(self, name: str) -> tuple[int, ...] | None:
        spec = self._raw.spec(name)
        return spec.shape if spec.dtype in EIGHT_BITS else None

    def dequantised(self, name: str) -> torch.Tensor:
        if name not in self._scales:
            raise UnsupportedError(
                f"the tensor {name} has 8-bit numbers and no scales beside it ({name}_scale_inv or {name}_scale); "
                "use the model's full-precision release"
            )
        return dequantise(name, self._raw.read(name), self._raw.read(self._scales[name]), self._block)


def dequantise(
    name: str, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """`weight (..., rows, columns)` of 8-bit floats times its scales: float32, of the same shape.

    `scale` holds one number, one for each row, or a grid `(..., ⌈rows / block rows⌉, ⌈columns / block columns⌉)`.
    Raises `UnsupportedError` for scales that are integers, `MismatchError` for those that do not fit.
    """
    if not scale.is_floating_point():
        raise UnsupportedError(
            f"the scales of {name} are {scale.dtype}, and factors are floats; use the model's full-precision release"
        )
    W, s = weight.float(), scale.float()
    if s.numel() == 1:
        return W.mul_(s.reshape(()))
    rows, columns = W.shape[-2:]
    if s.shape == W.shape[:-1]:
        s = s[..., None]
    if s.shape[:-1] == W.shape[:-1] and s.shape[-1] == 1:
        return W.mul_(s)
    grid = s.shape[-2:] if s.dim() == W.dim() else (0, 0)
    height, width = block or (math.ceil(rows / max(grid[0], 1)), math.ceil(columns / max(grid[1], 1)))
    expected = (*W.shape[:-2], math.ceil(rows / height), math.ceil(columns / width))
    if s.shape != expected:
        raise MismatchError(
            f"the scales of {name} have the shape {list(s.shape)}, but its {list(W.shape)} numbers in blocks of "
            f"{height} x {width} need {list(expected)}; config.json and weights do not belong together"
        )
    by_row = s.repeat_interleave(height, dim=-2)[..., :rows, :]
    for number in range(grid[1]):
        W[..., number * width : (number + 1) * width].mul_(by_row[..., number : number + 1])
    return W


def is_fp8(quantisation: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that weights are FP8 numbers and scales, and nothing else."""
    match quantisation.get("quant_method"):
        case "fp8":
            return bool(quantisation.get("expert_dtype", "fp8") == "fp8")
        case "fbgemm_fp8":
            return True
        case "modelopt":
            return bool(quantisation.get("quant_algo") == "FP8")
        case "compressed-tensors":
            formats = {quantisation.get("format"), *(group.get("format") for group in groups_of(quantisation))}
            weights = [group.get("weights") for group in groups_of(quantisation)]
            # In MXFP8 scales are exponents.
            known = formats <= {None, "float-quantized", "naive-quantized"} and not extras(quantisation)
            return known and _are_fp8(weights)
    return False


def _are_fp8(weights: list[Any]) -> bool:
    return bool(weights) and all(w and w.get("type") == "float" and w.get("num_bits") == 8 for w in weights)


def block_size(quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks that have a scale each, if the configuration names them."""
    found = quantisation.get("weight_block_size")
    for group in groups_of(quantisation):
        found = found or (group.get("weights") or {}).get("block_structure")
    if isinstance(found, (list, tuple)) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found):
        return found[0], found[1]
    return None
