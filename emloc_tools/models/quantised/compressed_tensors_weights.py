"""compressed-tensors checkpoints read as full precision: the library itself decompresses each weight as it is read.

A weight `<module>.weight` is stored as `<module>.weight_packed` (several numbers to a word) or under its own name in 8
bits, with `weight_scale`, and where need be `weight_zero_point`, `weight_shape`, `weight_global_scale` and
`weight_g_idx` beside it. ModelOpt's NVFP4 is the same but for names: packed numbers are `weight`, and `weight_scale_2`
is the inverse of the global scale. Rows are decompressed some at a time, since the library's temporaries are larger
than the numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.quantised.compressed_tensors_schemes import Schemes
from emloc_tools.models.quantised.folder import DequantisedFolder, without

PARTS = ("packed", "scale", "scale_2", "zero_point", "shape", "g_idx", "global_scale")
BESIDE = re.compile(
    rf".*\.(weight_({'|'.join(PARTS)})|(input|output|k|v|q)_(scale|zero_point|global_scale))", re.ASCII | re.DOTALL
)
EIGHT_BITS = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
PER_GROUP = ("weight_scale", "weight_zero_point")
WORD = 32  # bits; also the rows whose packed zero points end with a word, whatever their bits
AT_ONCE = 1 << 24  # numbers that are decompressed together

State = dict[str, torch.Tensor]


class CompressedTensorsFolder(DequantisedFolder):
    """The tensors of a compressed-tensors checkpoint in `dtype`, without what belongs to quantised ones.

    Raises `UnsupportedError` for a weight of which the library makes nothing, `MismatchError` for parts that do not
    fit.
    """

    def __init__(self, raw: TensorFolder, quantisation: Mapping[str, Any], dtype: torch.dtype) -> None:
        packed = {name.removesuffix("_packed"): name for name in raw.weight_map if name.endswith(".weight_packed")}
        hidden = [name for name in raw.weight_map if BESIDE.fullmatch(name)]
        super().__init__(raw, without(raw.weight_map, hidden) | packed, dtype)
        self._packed, self._schemes = packed, Schemes(quantisation)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def quantised_shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._packed:
            spec = self._raw.spec(name)
            if not name.endswith(".weight") or spec.dtype not in EIGHT_BITS:
                return None
            if f"{name}_scale" not in self._raw:
                raise UnsupportedError(
                    f"the tensor {name} has 8-bit numbers and no {name}_scale beside it; use the model's "
                    "full-precision release"
                )
            if f"{name}_scale_2" not in self._raw:
                return spec.shape
        if name not in self._shapes:
            self._shapes[name] = self._read_shape(name)
        return self._shapes[name]

    def dequantised(self, name: str) -> torch.Tensor:
        from compressed_tensors.compressors import BaseCompressor

        shape = self.quantised_shape(name)
        assert shape is not None  # `read` asks for quantised tensors alone
        scheme = self._schemes.of(name.removesuffix(".weight"))
        state = self._state(name)
        args = _fitted(name, state, scheme, shape)
        scheme = scheme.model_copy(update={"weights": args})
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        rows, columns = shape
        step = rows if args.strategy == "block" else max(AT_ONCE // columns // WORD, 1) * WORD
        W = torch.empty(shape, dtype=self._dtype)
        for start in range(0, rows, step):
            some = _rows(state, start, min(start + step, rows), shape, args.num_bits)
            W[start : start + step] = compressor.decompress(some, scheme)["weight"]
        return W

    def _state(self, name: str) -> State:
        """The parts of a weight under the names that the library gives them, scales of plain floats in float32."""
        state = {"weight_packed" if name in self._packed else "weight": self._raw.read(self._packed.get(name, name))}
        for part in PARTS[1:]:
            if f"{name}_{part}" in self._raw:
                state[f"weight_{part}"] = self._raw.read(f"{name}_{part}")
        if "weight_scale_2" in state:
            state["weight_packed"] = state.pop("weight")
            state["weight_global_scale"] = 1 / state.pop("weight_scale_2").float().reshape(1)
        if "weight_scale" not in state:
            raise _misfit(name, f"lacks {name}_scale")
        if state["weight_scale"].is_floating_point():
            state["weight_scale"] = state["weight_scale"].float()
        return state

    def _read_shape(self, name: str) -> tuple[int, ...]:
        """Rows and columns of a packed weight: stored beside it, else what the numbers fill."""
        packed = self._raw.spec(self._packed.get(name, name))
        if len(packed.shape) != 2:
            raise UnsupportedError(
                f"the packed tensor {packed.name} has {len(packed.shape)} dimensions, and only matrices are read; use "
                "the model's full-precision release"
            )
        if f"{name}_shape" in self._raw:
            shape = tuple(int(side) for side in self._raw.read(f"{name}_shape").flatten())
            if len(shape) != 2 or min(shape) < 1:
                raise _misfit(f"{name}_shape", f"is {list(shape)}, where rows and columns belong")
            return shape
        bits = self._schemes.of(name.removesuffix(".weight")).weights.num_bits
        return packed.shape[0], packed.shape[1] * packed.dtype.itemsize * 8 // bits


def _fitted(name: str, state: State, scheme: Any, shape: tuple[int, ...]) -> Any:
    """The library's arguments for the weight; its parts are checked, and scales brought into their shape.

    A column's group may be its own choice (`weight_g_idx`, of checkpoints before 2026), or the last one incomplete.
    Then `weight_g_idx` says for every column which scale is its own, and the group size becomes 1.
    """
    args, (rows, columns) = scheme.weights, shape
    group = args.group_size or columns
    match args.strategy:
        case "tensor":
            expected = (1, 1)
        case "channel":
            expected = (rows, 1)
        case "group" | "tensor_group":
            expected = (rows, math.ceil(columns / group))
        case "block":
            expected = tuple(math.ceil(side / block) for side, block in zip(shape, args.block_structure, strict=True))
        case other:
            raise UnsupportedError(f"{name} is quantised by {other}; use the model's full-precision release")
    in_words = scheme.format == "pack-quantized"  # others pack into bytes, or not at all
    if "pack" in scheme.format:
        width = math.ceil(columns * args.num_bits / (WORD if in_words else 8))
        _require(name, state, "weight_packed", (rows, width), torch.int32 if in_words else torch.uint8)
    else:
        _require(name, state, "weight", (rows, columns))
    _require(name, state, "weight_scale", expected)
    if not args.symmetric:
        packed = in_words and args.strategy in ("group", "channel")
        words = math.ceil(rows * args.num_bits / WORD)
        _require(name, state, "weight_zero_point", (words, expected[1]) if packed else expected)
    if args.strategy == "tensor_group":
        _require(name, state, "weight_global_scale", (1,))
    given = state.pop("weight_g_idx", None)
    if given is not None and bool((given < 0).any()):
        given = None  # -1 stands for columns in their order
    if args.strategy == "group" and (given is not None or columns % group):
        index = torch.arange(columns) // group if given is None else given.long()
        if index.shape != (columns,) or not 0 <= int(index.min()) <= int(index.max()) < expected[1]:
            raise _misfit(f"{name}_g_idx", f"does not give each of {columns} columns one of {expected[1]} groups")
        state["weight_g_idx"] = index
        args = args.model_copy(update={"group_size": 1})
    return args


def _rows(state: State, start: int, stop: int, shape: tuple[int, ...], bits: int) -> State:
    """The parts of the rows from `start`, which is a multiple of 32, to `stop`; scales for every column if asked."""
    rows, columns = shape
    index = state.get("weight_g_idx")
    some = {}
    for part, tensor in state.items():
        if part == "weight_g_idx":
            continue
        if part == "weight_zero_point" and tensor.dtype == torch.int32:  # packed along the rows
            tensor = tensor[start * bits // WORD : math.ceil(stop * bits / WORD)]
            if len(tensor) == 1:  # which release 0.20 cannot unpack by itself
                tensor = nn.functional.pad(tensor, (0, 0, 0, 1))
        elif tensor.dim() == 2 and tensor.shape[0] == rows:
            tensor = tensor[start:stop]
        some[part] = tensor if index is None or part not in PER_GROUP else tensor[:, index]
    return {**some, "weight_shape": torch.tensor([stop - start, columns])}


def _require(name: str, state: State, part: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Refuse a part that is not there or has another number of entries than `shape`, which it gets."""
    key = name.removesuffix("weight") + part
    if part not in state:
        raise _misfit(name, f"lacks {key}")
    found = state[part]
    if found.numel() != math.prod(shape) or (dtype is not None and found.dtype != dtype):
        kind = "" if dtype is None else f" {dtype}"
        raise _misfit(key, f"is {found.dtype} of shape {list(found.shape)}, where{kind} {list(shape)} belongs")
    state[part] = found.reshape(shape)


def _misfit(name: str, what: str) -> MismatchError:
    return MismatchError(f"{name} {what}; config.json and weights do not belong together, or the checkpoint is damaged")
