"""GPTQ checkpoints read as full precision: integers of 2, 3, 4 or 8 bits, minus a zero point, times a scale.

A layer of `in` inputs and `out` outputs is stored as `qweight (in * bits / 32, out)`, packed along its inputs; `scales`
and, packed along its outputs, `qzeros (groups, out * bits / 32)` for each group of inputs; and `g_idx (in,)`, the group
of each input. The first version of the format holds zero points less one, modulo 2^bits; the second holds them as they
are. AutoRound writes both. No library that does this can be an ordinary dependency (docs/bases.md), so it is done here,
some inputs at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.quantised.folder import DequantisedFolder, without
from emloc_tools.models.quantised.packed_words import WORD, unpack

BITS = (2, 3, 4, 8)
# What the layouts are called, and how much less their zero points are.
LAYOUTS = {"gptq": 1, "gptq_v2": 0, "auto_round:auto_gptq": 1, "auto_round:gptqmodel": 0, "auto_round": 0}
PARTS = ("qweight", "qzeros", "scales", "g_idx")
AT_ONCE = 1 << 24  # numbers that are unpacked together


class GptqFolder(DequantisedFolder):
    """The tensors of a GPTQ checkpoint in `dtype`, without the parts of quantised ones.

    The bits of a layer are told by its shapes, so they may differ between layers. Raises `MismatchError` for parts that
    do not fit.
    """

    def __init__(self, raw: TensorFolder, quantisation: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._layers = {f"{module}.weight": module for module in quantised_modules(raw)}
        hidden = [f"{module}.{part}" for module in self._layers.values() for part in PARTS]
        shown = {name: f"{module}.qweight" for name, module in self._layers.items()}
        super().__init__(raw, without(raw.weight_map, hidden) | shown, dtype)
        self._group = int(quantisation.get("group_size") or -1)
        self._less = LAYOUTS[_layout(quantisation)]

    def quantised_shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._layers:
            return None
        _, inputs, outputs = self._sizes(self._layers[name])
        return outputs, inputs

    def dequantised(self, name: str) -> torch.Tensor:
        module = self._layers[name]
        bits, inputs, outputs = self._sizes(module)
        words, scales = self._raw.read(f"{module}.qweight"), self._raw.read(f"{module}.scales").float()
        zeros = (unpack(self._raw.read(f"{module}.qzeros"), bits, dim=1) + self._less) & ((1 << bits) - 1)
        groups = self._groups(module, inputs, len(scales))
        W = torch.empty(outputs, inputs, dtype=self._dtype)
        step = max(AT_ONCE // outputs // WORD, 1) * WORD  # 32 inputs fill whole words, whatever their bits
        for start in range(0, inputs, step):
            of = groups[start : start + step]
            numbers = unpack(words[start * bits // WORD : (start + step) * bits // WORD], bits, dim=0)[: len(of)]
            W[:, start : start + step] = ((numbers - zeros[of]) * scales[of]).T
        return W

    def _sizes(self, module: str) -> tuple[int, int, int]:
        """Bits, inputs and outputs of a layer, from the shapes of its parts."""
        specs = {part: self._raw.spec(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in self._raw}
        shapes = {part: spec.shape for part, spec in specs.items()}
        packed = all(part in specs and specs[part].dtype == torch.int32 for part in ("qweight", "qzeros"))
        if packed and all(len(shapes.get(part, ())) == 2 for part in PARTS[:3]):
            (rows, outputs), (groups, columns) = shapes["qweight"], shapes["qzeros"]
            bits = columns * WORD // max(outputs, 1)
            filled = rows * WORD // max(bits, 1)
            inputs = shapes.get("g_idx", (filled,))[0]  # the words may hold more, to be whole
            fits = bits in BITS and columns * WORD == outputs * bits and shapes["scales"] == (groups, outputs)
            if fits and filled - WORD < inputs <= filled:
                return bits, inputs, outputs
        raise MismatchError(
            f"{module} has parts that are not those of a layer in GPTQ, of 2, 3, 4 or 8 bits: "
            f"{ {part: list(shape) for part, shape in shapes.items()} }; the checkpoint is damaged or in another format"
        )

    def _groups(self, module: str, inputs: int, count: int) -> torch.Tensor:
        """The group of each input `(inputs,)`: as stored, for an order by activation mixes them, or in turn."""
        if f"{module}.g_idx" in self._raw:
            groups = self._raw.read(f"{module}.g_idx").long()
        else:
            size = self._group if self._group > 0 else inputs
            if count != -(-inputs // size):
                raise MismatchError(
                    f"{module} has scales for {count} groups of its {inputs} inputs, and config.json says groups of "
                    f"{size}; a layer with a group size of its own can be read only where it stores g_idx"
                )
            groups = torch.arange(inputs) // size
        if not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise MismatchError(
                f"{module} has inputs of group {int(groups.max())}, and scales for {count} groups; config.json and "
                "weights do not belong together, or the checkpoint is damaged"
            )
        return groups


def quantised_modules(raw: TensorFolder) -> list[str]:
    """The modules of which `raw` holds packed weights, as GPTQ and AWQ call them.

    Raises `UnsupportedError` for scales without such, which some models multiply activations by.
    """
    modules = [name.removesuffix(".qweight") for name in raw.weight_map if name.endswith(".qweight")]
    known = set(modules)
    for name in raw.weight_map:
        if name.endswith((".scales", ".qzeros")) and name.rpartition(".")[0] not in known:
            raise UnsupportedError(
                f"the tensor {name} belongs to no packed weight, so the model computes otherwise than its "
                "full-precision release; use that"
            )
    return modules


def is_gptq(quantisation: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one of GPTQ, or of AutoRound, in one of the layouts that are read."""
    known = quantisation.get("quant_method") in ("gptq", "auto-round") and _layout(quantisation) in LAYOUTS
    return known and not quantisation.get("is_marlin_format") and quantisation.get("bits") in BITS


def _layout(quantisation: Mapping[str, Any]) -> str:
    if quantisation.get("quant_method") == "auto-round":
        return str(quantisation.get("packing_format"))
    return str(quantisation.get("checkpoint_format") or "gptq")
