"""AWQ checkpoints read as full precision: integers of 4 bits, minus a zero point, times the scale of their group.

A layer of `in` inputs and `out` outputs is stored as `qweight (in, out / 8)`, `qzeros (groups, out / 8)` and
`scales (groups, out)`. A word holds eight outputs; from its lowest bits on these are number 0, 2, 4, 6, 1, 3, 5 and 7.
This is the version called `gemm`; the others lay words out for one kernel. No library that does this can be an ordinary
dependency (docs/bases.md), so it is done here, some inputs at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from emloc_tools.errors import MismatchError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.quantised.folder import DequantisedFolder, without
from emloc_tools.models.quantised.gptq import quantised_modules
from emloc_tools.models.quantised.packed_words import unpack

BITS = 4
IN_A_WORD = 8
STORED = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in a word, from its lowest bits on
PARTS = ("qweight", "qzeros", "scales")
AT_ONCE = 1 << 24  # numbers that are unpacked together


class AwqFolder(DequantisedFolder):
    """The tensors of an AWQ checkpoint in `dtype`, without the parts of quantised ones.

    Raises `MismatchError` for parts that do not fit.
    """

    def __init__(self, raw: TensorFolder, quantisation: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._layers = {f"{module}.weight": module for module in quantised_modules(raw)}
        hidden = [f"{module}.{part}" for module in self._layers.values() for part in PARTS]
        shown = {name: f"{module}.qweight" for name, module in self._layers.items()}
        super().__init__(raw, without(raw.weight_map, hidden) | shown, dtype)
        self._group = group_size(quantisation)

    def quantised_shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._layers:
            return None
        module = self._layers[name]
        specs = {part: self._raw.spec(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in self._raw}
        shapes = {part: spec.shape for part, spec in specs.items()}
        if specs["qweight"].dtype == torch.int32 and len(shapes["qweight"]) == 2:
            inputs, words = shapes["qweight"]
            groups = math.ceil(inputs / (self._group if self._group > 0 else inputs))
            expected = {"qweight": (inputs, words), "qzeros": (groups, words), "scales": (groups, words * IN_A_WORD)}
            if shapes == expected:
                return words * IN_A_WORD, inputs
        raise MismatchError(
            f"{module} has parts that are not those of a layer in AWQ with groups of {self._group} inputs: "
            f"{ {part: list(shape) for part, shape in shapes.items()} }; config.json and weights do not belong together"
        )

    def dequantised(self, name: str) -> torch.Tensor:
        module, shape = self._layers[name], self.quantised_shape(name)
        assert shape is not None  # `read` asks for quantised tensors alone
        outputs, inputs = shape
        words, scales = self._raw.read(f"{module}.qweight"), self._raw.read(f"{module}.scales").float()
        zeros = _unpack(self._raw.read(f"{module}.qzeros"))
        groups = torch.arange(inputs) // (self._group if self._group > 0 else inputs)
        W = torch.empty(shape, dtype=self._dtype)
        step = max(AT_ONCE // outputs, 1)
        for start in range(0, inputs, step):
            of = groups[start : start + step]
            W[:, start : start + step] = ((_unpack(words[start : start + step]) - zeros[of]) * scales[of]).T
        return W


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """The numbers `(rows, 8 columns)` of words `(rows, columns)`, in the order of the layer's outputs."""
    stored = unpack(words, BITS, dim=1).view(len(words), -1, IN_A_WORD)
    ordered = torch.empty_like(stored)
    ordered[..., list(STORED)] = stored
    return ordered.flatten(1)


def is_awq(quantisation: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one of AWQ, or of AutoRound in its layout, in the version called gemm."""
    if quantisation.get("quant_method") == "auto-round":
        return quantisation.get("packing_format") == "auto_round:auto_awq" and quantisation.get("bits") == BITS
    version = str(quantisation.get("version") or quantisation.get("format") or "gemm").lower()
    bits = quantisation.get("bits", quantisation.get("w_bit"))
    return quantisation.get("quant_method") == "awq" and version == "gemm" and bits == BITS


def group_size(quantisation: Mapping[str, Any]) -> int:
    """Inputs that share a scale; -1 for all."""
    return int(quantisation.get("group_size") or quantisation.get("q_group_size") or -1)
