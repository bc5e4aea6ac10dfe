"""Which rows of what a layer reads are real tokens, and which are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from emloc_tools.data.batches import Batch
from emloc_tools.streaming.layouts import Layouts
from emloc_tools.streaming.stream import LockStep

IGNORED = -100  # the label of a position that is no target
MODALITIES = ("image", "video", "audio")


class Padding:
    """Gives the masks `(batch, length)` of real tokens, True for real, that belong to what each layer reads.

    The mask of a batch tells the tokens that go into the model. In a model with an encoder and a decoder these are the
    encoder's. There the mask holds for the encoder's layers, and for those of the decoder that read the encoder's
    result. The decoder's own tokens are real as `decoder_attention_mask` says, or else up to the last label. Towers for
    images and sound know no padding of tokens, whatever shape their rows have. A mask has the layout of what the layer
    reads (see `layouts`).

    Made before the batches of `stream` run, since what the encoder gives is told by watching it.
    """

    def __init__(self, stream: LockStep, batches: Sequence[Batch]) -> None:
        self._stream = stream
        self._masks = [batch.mask for batch in batches]
        self._decoder_masks = [_decoder_mask(batch.inputs) for batch in batches]
        self._layouts = Layouts(stream.model, [batch.inputs for batch in batches])
        self._encoded: dict[int, torch.Tensor] = {}  # by batch, what the encoder gave
        self._reads_encoder: set[str] = set()
        self._towers: tuple[str, ...] = ()
        self._encoder: tuple[str, ...] = ()
        self._handles: list[Any] = []
        model: Any = stream.model
        if not hasattr(model, "get_encoder"):
            return
        if getattr(model.config, "is_encoder_decoder", False):
            encoder = model.get_encoder()
            self._encoder = _beginnings(model, [encoder])
            self._handles.append(encoder.register_forward_hook(self._keep))
        else:
            towers = [model.get_encoder(modality=modality) for modality in MODALITIES]
            self._towers = _beginnings(model, [tower for tower in towers if tower is not model])

    def mask(self, batch: int, layer: str, x: torch.Tensor | None = None) -> torch.Tensor | None:
        """The mask for what `layer` reads in a batch; None where everything is real.

        `x` is what it reads, which must be given in the forward; later the layer's kind is known.
        """
        if layer.startswith(self._towers):
            return None
        mask = self._masks[batch]
        if self._encoder and not layer.startswith(self._encoder):
            if x is not None and _same(x, self._encoded.get(batch)):
                self._reads_encoder.add(layer)
            if layer not in self._reads_encoder:
                mask, x = self._decoder_masks[batch], None  # the decoder's own tokens are never filled up
        return self._layouts.of(batch, layer, mask, x)

    def close(self) -> None:
        """Stop watching the encoder, and forget what it gave."""
        for handle in self._handles:
            handle.remove()
        self._encoded.clear()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._encoded[self._stream.current] = (output[0] if not isinstance(output, torch.Tensor) else output).detach()


def real_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The rows `(tokens, features)` of real tokens in `x (..., features)`, copied: the model may change x in place.

    The mask is applied to tensors with its leading dimensions, others of size 1 aside, or with as many rows; others,
    such as image patches, have no padding.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and len(rows) == mask.numel():
        leading, expected = ([size for size in shape if size != 1] for shape in (x.shape[:-1], mask.shape))
        if leading == expected or x.dim() == 2:
            return rows[mask.reshape(-1)]
    return rows.clone()


def real_slots(x: torch.Tensor, mask: torch.Tensor | None, tokens: torch.Tensor, of: int) -> torch.Tensor:
    """The rows of real tokens in `x (slots, features)`, copied, where slot i holds the row `tokens[i]` of `of` rows."""
    if mask is not None and mask.numel() == of:
        return x[mask.reshape(-1)[tokens]]
    return x.clone()


def _decoder_mask(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The real tokens of a decoder: what a label follows later on was written from real ones."""
    mask = inputs.get("decoder_attention_mask")
    if mask is None and "labels" in inputs and inputs["labels"].dim() == 2:
        real = inputs["labels"] != IGNORED
        mask = real.flip(1).cumsum(1).flip(1) > 0
    return None if mask is None or mask.dim() != 2 or bool(mask.all()) else mask.bool()


def _beginnings(model: nn.Module, modules: Sequence[nn.Module]) -> tuple[str, ...]:
    """How the names of what lies in the modules begin; a module may have several names."""
    return tuple(
        f"{name}." for name, member in model.named_modules(remove_duplicate=False) if any(member is m for m in modules)
    )


def _same(x: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and x.data_ptr() == other.data_ptr() and x.numel() == other.numel()
