"""Checkpoints of bitsandbytes read as full-precision ones: the library itself dequantises each weight as it is read.

As transformers saves them, a weight of 4 bits (nf4 or fp4) is a column of packed numbers beside its state:
`<weight>.absmax` (the scale of each block), `<weight>.quant_map`, the same of the scales where these are quantised too
(`nested_…`), and a small JSON as `<weight>.quant_state.bitsandbytes__nf4`. A weight of 8 bits has one scale per row in
`SCB`, beside `weight_format`. bitsandbytes is an extra that only these need, so it is imported here on first use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.quantised.folder import DequantisedFolder, without

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that the library dequantises
DTYPES = ("float16", "bfloat16", "float32")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class State:
    """What the JSON of a 4-bit weight says; `nested` is the block size of its scales where these are quantised."""

    shape: tuple[int, ...]
    block: int
    nested: int | None

    def sizes(self) -> dict[str, int]:
        """How many numbers each tensor of the state must have: the library reads that many without asking."""
        blocks = math.ceil(math.prod(self.shape) / self.block)
        sizes = {"absmax": blocks, "quant_map": 16}
        if self.nested:
            sizes |= {"nested_absmax": math.ceil(blocks / self.nested), "nested_quant_map": 256}
        return sizes


class BitsandbytesFolder(DequantisedFolder):
    """The tensors of a bitsandbytes checkpoint in `dtype`, without what belongs to quantised ones.

    Raises `UnsupportedError` for packed numbers without a state, `MismatchError` for a state that does not fit.
    """

    def __init__(self, raw: TensorFolder, dtype: torch.dtype) -> None:
        self._state_keys = {
            name: f"{name}{STATE}{kind}"
            for name in raw.weight_map
            for kind in KINDS
            if f"{name}{STATE}{kind}" in raw.weight_map
        }
        self._scales = {
            name: scale
            for name in raw.weight_map
            if name.endswith("weight") and (scale := f"{name.removesuffix('weight')}SCB") in raw.weight_map
        }
        hidden = {*self._state_keys.values(), *self._scales.values()}
        hidden |= {f"{name}.{part}" for name in self._state_keys for part in PARTS}
        hidden |= {f"{name}_format" for name in self._scales}
        super().__init__(raw, without(raw.weight_map, hidden), dtype)
        self._states: dict[str, State] = {}

    def quantised_shape(self, name: str) -> tuple[int, ...] | None:
        if name in self._state_keys:
            return self._state(name).shape
        spec = self._raw.spec(name)
        packed = spec.dtype in (torch.int8, torch.uint8) and name.endswith("weight")
        return spec.shape if packed else None

    def dequantised(self, name: str) -> torch.Tensor:
        if name in self._state_keys:
            return self._of_4_bits(name)
        if name in self._scales:
            return self._of_8_bits(name)
        raise UnsupportedError(
            f"the tensor {name} has packed numbers, and neither {name}{STATE}nf4 (or fp4) nor SCB beside it; "
            "use the model's full-precision release"
        )

    def _of_4_bits(self, name: str) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = self._state(name)
        parts = {}
        for part, size in state.sizes().items():
            if f"{name}.{part}" not in self._raw:
                raise _misfit(name, f"lacks {name}.{part}")
            parts[part] = self._raw.read(f"{name}.{part}")
            _require_size(f"{name}.{part}", parts[part].numel(), size)
        if (parts["absmax"].dtype == torch.uint8) != bool(state.nested):
            raise _misfit(f"{name}.absmax", f"is {parts['absmax'].dtype}, which does not go with the weight's state")
        packed = self._raw.read(name)
        _require_size(name, packed.nbytes, math.ceil(math.prod(state.shape) / 2), "bytes")
        key = self._state_keys[name]
        parts[key.removeprefix(f"{name}.")] = self._raw.read(key)
        known = QuantState.from_dict(parts, torch.device("cpu"))
        # A row for each block: in release 0.50 the library's CPU kernel starts a block anew with every row, which gives
        # wrong numbers where blocks do not divide rows. The last block may be incomplete.
        blocks, count = state.sizes()["absmax"], math.prod(state.shape)
        known.shape = torch.Size((blocks, state.block))
        padded = torch.zeros(blocks * state.block // 2, dtype=torch.uint8)
        padded[: packed.nbytes] = packed.flatten().view(torch.uint8)
        W: torch.Tensor = dequantize_4bit(padded, known)
        return W.flatten()[:count].view(state.shape)

    def _of_8_bits(self, name: str) -> torch.Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        numbers, scales = self._raw.read(name), self._raw.read(self._scales[name])
        if numbers.dtype != torch.int8 or numbers.dim() != 2:
            raise _misfit(name, f"is {numbers.dtype} of shape {list(numbers.shape)} where int8 in two dimensions goes")
        _require_size(self._scales[name], scales.numel(), numbers.shape[0])
        if f"{name}_format" in self._raw and int(self._raw.read(f"{name}_format")) != 0:
            raise UnsupportedError(
                f"the tensor {name} is laid out for one kind of GPU ({name}_format is not 0, rows); save the model "
                "again with a current bitsandbytes, or use its full-precision release"
            )
        W: torch.Tensor = int8_vectorwise_dequant(numbers, scales.float())
        return W

    def _state(self, name: str) -> State:
        if name not in self._states:
            self._states[name] = self._read_state(name)
        return self._states[name]

    def _read_state(self, name: str) -> State:
        key = self._state_keys[name]
        try:
            values = json.loads(bytes(self._raw.read(key).tolist()))
            shape, nested = tuple(values["shape"]), values.get("nested_blocksize")
            valid = (
                all(type(n) is int and n > 0 for n in shape)
                and values["quant_type"] == key.rpartition("__")[2]
                and values["blocksize"] in BLOCK_SIZES
                and values["dtype"] in DTYPES
                and (nested is None) == (f"{name}.nested_absmax" not in self._raw)
                and (nested is None or _is_nested(values))
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _misfit(key, f"is no state of bitsandbytes ({type(error).__name__}: {error})") from error
        if not valid:
            raise _misfit(key, f"is no state that bitsandbytes reads: {values}")
        return State(shape, values["blocksize"], nested)


def _is_nested(values: dict[str, Any]) -> bool:
    known = values["nested_blocksize"] in BLOCK_SIZES and values["nested_dtype"] == "float32"
    return known and math.isfinite(values["nested_offset"])


def is_bitsandbytes(quantisation: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one of bitsandbytes; old ones do not name their method."""
    method = quantisation.get("quant_method")
    return method == "bitsandbytes" or (
        method is None and any(quantisation.get(flag) for flag in ("load_in_4bit", "load_in_8bit"))
    )


def _require_size(name: str, found: int, expected: int, unit: str = "numbers") -> None:
    if found != expected:
        raise _misfit(name, f"has {found} {unit} where {expected} belong")


def _misfit(name: str, what: str) -> MismatchError:
    return MismatchError(f"{name} {what}; the checkpoint is damaged, so download or save it again")
