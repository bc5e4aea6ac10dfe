"""torchao checkpoints read as full precision: numbers of 8 bits, minus a zero point, times the scale of their block.

As transformers saves them, a weight `<module>.weight` is `<module>._weight_qdata`, `<module>._weight_scale` and, for
integers, `<module>._weight_zero_point`; the metadata of the file say of which class of torchao it is, and its blocks.
Classes that hold the numbers unpacked are read, by their definition: installed, the library is imported by others
whenever they load a model. The classes of packed numbers lay them out for a kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.quantised.folder import DequantisedFolder, without

KINDS = {"Float8Tensor": torch.float8_e4m3fn, "Int8Tensor": torch.int8, "IntxUnpackedToInt8Tensor": torch.int8}
PARTS = ("qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale")
READ = PARTS[:3]
QDATA = re.compile(r"(?P<module>.+)\._(?P<name>\w+)_qdata", re.ASCII | re.DOTALL)


class TorchaoFolder(DequantisedFolder):
    """The tensors of a torchao checkpoint in `dtype`, without the parts of quantised ones.

    Raises `UnsupportedError` for classes that pack numbers or scale activations, `MismatchError` for parts that do not
    fit.
    """

    def __init__(self, raw: TensorFolder, dtype: torch.dtype) -> None:
        found = [match for match in map(QDATA.fullmatch, raw.weight_map) if match]
        self._stems = {f"{match['module']}.{match['name']}": f"{match['module']}._{match['name']}" for match in found}
        hidden = [f"{stem}_{part}" for stem in self._stems.values() for part in PARTS]
        shown = {name: f"{stem}_qdata" for name, stem in self._stems.items()}
        super().__init__(raw, without(raw.weight_map, hidden) | shown, dtype)

    def quantised_shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._stems:
            return None
        spec = self._raw.spec(f"{self._stems[name]}_qdata")
        kind = self._description(name).get("_type")
        others = [part for part in PARTS if part not in READ and f"{self._stems[name]}_{part}" in self._raw]
        if kind not in KINDS or others:
            raise UnsupportedError(
                f"the tensor {name} is a {kind} of torchao{' with ' + others[0] if others else ''}, and only "
                f"{', '.join(KINDS)} are read; use the model's full-precision release"
            )
        if spec.dtype != KINDS[kind]:
            raise _misfit(f"{self._stems[name]}_qdata", f"is {spec.dtype}, where {KINDS[kind]} belongs")
        return spec.shape

    def dequantised(self, name: str) -> torch.Tensor:
        stem, shape = self._stems[name], self.quantised_shape(name)
        assert shape is not None  # `read` asks for quantised tensors alone
        parts = {part: self._raw.read(f"{stem}_{part}") for part in READ if f"{stem}_{part}" in self._raw}
        block = self._description(name).get("_data", {}).get("block_size")
        fits = (
            isinstance(block, list)
            and len(block) == len(shape)
            and all(type(side) is int and side > 0 for side in block)
        )
        if not fits or any(side % length for side, length in zip(shape, block, strict=True)):
            raise _misfit(name, f"has blocks of {block}, into which {list(shape)} cannot be cut")
        blocks = [side // length for side, length in zip(shape, block, strict=True)]
        W = parts["qdata"].float()
        for part, apply in (("zero_point", torch.Tensor.sub_), ("scale", torch.Tensor.mul_)):
            if part in parts:
                if parts[part].numel() != torch.Size(blocks).numel():
                    raise _misfit(f"{stem}_{part}", f"has shape {list(parts[part].shape)}, where {blocks} belongs")
                apply(W, _spread(parts[part].float().reshape(blocks), block))
            elif part == "scale":
                raise _misfit(name, f"lacks {stem}_scale")
        return W

    def _description(self, name: str) -> Mapping[str, Any]:
        """What the metadata of the file say of a tensor, once the file is open."""
        key = f"{self._stems[name]}_qdata"
        self._raw.spec(key)
        try:
            found = json.loads(self._raw.metadata_of(self._raw.weight_map[key])[name])
        except (KeyError, ValueError) as error:
            raise _misfit(name, "has no description of torchao in the metadata of its file") from error
        if not isinstance(found, dict) or not isinstance(found.get("_data", {}), dict):
            raise _misfit(name, f"is described as {found}")
        return found


def is_torchao(quantisation: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one of torchao."""
    return quantisation.get("quant_method") == "torchao"


def _spread(values: torch.Tensor, block: list[int]) -> torch.Tensor:
    """A value for each entry of the blocks; views where a block has one row, since the product broadcasts."""
    for dim, length in enumerate(block):
        if length > 1 and values.shape[dim] > 1:
            values = values.repeat_interleave(length, dim=dim)
    return values


def _misfit(name: str, what: str) -> MismatchError:
    return MismatchError(
        f"{name} {what}; the checkpoint is damaged or of another release, so download or save it again"
    )
