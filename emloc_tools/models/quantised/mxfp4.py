"""GPT-OSS in MXFP4 read as full precision: 4-bit floats, two to a byte, times a power of two for each 32 of them.

A stack of experts `<name>` is stored as `<name>_blocks (experts, out, blocks, 16 bytes)` and
`<name>_scales (experts, out, blocks)`, and is `(experts, in, out)` in the model. transformers' own conversion is
applied, one expert at a time: its temporaries are larger than the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.quantised.folder import DequantisedFolder, without

BYTES_OF_A_BLOCK = 16


class Mxfp4Folder(DequantisedFolder):
    """The tensors of an MXFP4 checkpoint in `dtype`, under the names that they have in full precision.

    Raises `MismatchError` for blocks and scales that do not fit, `UnsupportedError` for other packed numbers.
    """

    def __init__(self, raw: TensorFolder, dtype: torch.dtype) -> None:
        ends = [name.removesuffix("_blocks") for name in raw.weight_map if name.endswith("_blocks")]
        self._stacks = frozenset(stem for stem in ends if f"{stem}_scales" in raw.weight_map)
        hidden = [f"{stem}_{part}" for stem in self._stacks for part in ("blocks", "scales")]
        super().__init__(raw, without(raw.weight_map, hidden) | {s: f"{s}_blocks" for s in self._stacks}, dtype)

    def quantised_shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._stacks:
            spec = self._raw.spec(name)
            if spec.dtype == torch.uint8:
                raise UnsupportedError(
                    f"the tensor {name} has packed numbers that are not blocks beside scales; "
                    "use the model's full-precision release"
                )
            return None
        blocks, scales = self._raw.spec(f"{name}_blocks"), self._raw.spec(f"{name}_scales")
        fit = len(blocks.shape) == 4 and blocks.shape[-1] == BYTES_OF_A_BLOCK and blocks.shape[:-1] == scales.shape
        if not fit or blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise MismatchError(
                f"{name}_blocks is {blocks.dtype} {list(blocks.shape)} and {name}_scales {scales.dtype} "
                f"{list(scales.shape)}, where bytes (experts, out, blocks, 16) and (experts, out, blocks) belong; "
                "the checkpoint is damaged, so download it again"
            )
        experts, out, count, _ = blocks.shape
        return experts, count * 2 * BYTES_OF_A_BLOCK, out

    def dequantised(self, name: str) -> torch.Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        shape = self.quantised_shape(name)
        assert shape is not None  # `read` asks for quantised tensors alone
        blocks, scales = self._raw.read(f"{name}_blocks"), self._raw.read(f"{name}_scales")
        W = torch.empty(shape, dtype=self._dtype)
        for e in range(len(W)):
            W[e] = convert_moe_packed_tensors(blocks[e : e + 1], scales[e : e + 1], dtype=self._dtype)[0]
        return W


def is_mxfp4(quantisation: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is that of GPT-OSS."""
    return quantisation.get("quant_method") == "mxfp4"
