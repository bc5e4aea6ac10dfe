"""The factors of an emulator in 4 bits, where transformers is told to load a model so by bitsandbytes.

This file is also pasted, as it is, into every emulator folder, before `lowrank_layers.py`. So it imports nothing but
torch and transformers, and bitsandbytes only where it is used.
"""

import importlib
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn import functional as F

BLOCK = 64  # numbers that share a scale


class FourBits(NamedTuple):
    """What a `BitsAndBytesConfig` with `load_in_4bit` says: kind of numbers, and dtypes to store and to compute in."""

    kind: str  # "nf4" or "fp4"
    nested: bool  # whether the scales of the blocks are quantised too
    storage: torch.dtype
    compute: torch.dtype

    def quantised(self, matrix: torch.Tensor) -> Any:
        """A frozen matrix, or a stack of them, row by row in blocks: half a byte and a part of a scale for each number.

        The rows of what bitsandbytes gets are the blocks, the last one of a matrix filled up with zeros. With rows of
        other lengths its kernels for CPUs may take the scale of another block.
        """
        # Not an import statement: transformers would ask everyone who loads this file for bitsandbytes.
        parameter = importlib.import_module("bitsandbytes.nn").Params4bit
        numbers = matrix.detach().flatten(-2)
        packed = parameter(
            F.pad(numbers, (0, -numbers.shape[-1] % BLOCK)).view(-1, BLOCK),
            requires_grad=False,
            blocksize=BLOCK,
            quant_type=self.kind,
            compress_statistics=self.nested,
            quant_storage=self.storage,
        )
        return packed.to(matrix.device)  # which quantises


def is_quantised(factor: Any) -> bool:
    """Whether a parameter holds packed numbers."""
    return getattr(factor, "quant_state", None) is not None


def dequantised(packed: torch.Tensor, state: Any, shape: tuple[int, int]) -> torch.Tensor:
    """A quantised matrix of a shape, in the dtype that it had."""
    blocks: torch.Tensor = importlib.import_module("bitsandbytes.functional").dequantize_4bit(packed, state)
    return blocks.flatten()[: shape[0] * shape[1]].view(shape)


def unstacked(packed: Any, count: int) -> list[tuple[torch.Tensor, Any]]:
    """The matrices of a quantised stack: their packed numbers, and how they are packed."""
    library = importlib.import_module("bitsandbytes.functional")
    state = packed.quant_state
    scales = state.absmax
    if state.nested:
        scales = library.dequantize_blockwise(state.absmax, state.state2) + state.offset
    kinds = {"code": state.code, "blocksize": BLOCK, "quant_type": state.quant_type, "dtype": state.dtype}
    parts = zip(packed.detach().as_subclass(torch.Tensor).view(count, -1, 1), scales.float().chunk(count), strict=True)
    return [(part, library.QuantState(own, shape=torch.Size((len(own), BLOCK)), **kinds)) for part, own in parts]


class Product(torch.autograd.Function):
    """`x (…, in)` times the transpose of a quantised `(out, in)`. Its gradient goes to `x` alone.

    The dense matrix is there during one product at a time: the backward pass makes it anew instead of keeping it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, state: Any, shape: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.state, ctx.shape = state, shape
        return F.linear(x, dequantised(packed, state, shape).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (packed,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ dequantised(packed, ctx.state, ctx.shape).to(gradient.dtype), None, None, None


def four_bits_of(model: Any) -> FourBits | None:
    """How the model that transformers is about to fill is to be quantised; None if it stays as it is.

    Raises ValueError for 8 bits, which these layers cannot be held in, and for transformers 4, which would put dense
    layers in their place.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(config, "load_in_8bit", False):
        raise ValueError("an EMLoC emulator can be loaded in 4 bits, not in 8: use load_in_4bit")
    if not getattr(config, "load_in_4bit", False):
        return None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(f"an EMLoC emulator in 4 bits needs transformers 5, and this is {transformers.__version__}")
    storage, compute = config.bnb_4bit_quant_storage, config.bnb_4bit_compute_dtype
    return FourBits(config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, storage, compute)


def skipped(model: Any, path: str) -> bool:
    """Whether the `llm_int8_skip_modules` of the configuration, parts of names, leave a layer as it is."""
    names = model.config.quantization_config.llm_int8_skip_modules or ()
    return any(f".{name}." in f".{path}." for name in names)
