"""Numbers of a few bits in words, by writing out every bit: a reference for what the package does with shifts."""

from __future__ import annotations

import numpy as np
import torch


def bits_of(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned numbers of each row of words or bytes, by its sequence of bits, lowest first."""
    rows = packed.contiguous().view(torch.uint8).numpy()
    sequence = np.unpackbits(rows, axis=1, bitorder="little")
    sequence = sequence[:, : sequence.shape[1] // bits * bits].reshape(len(rows), -1, bits)
    return torch.from_numpy((sequence * (1 << np.arange(bits))).sum(-1))


def pack_rows(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of the sequence of bits of each row."""
    sequence = ((numbers.numpy()[..., None] >> np.arange(bits)) & 1).reshape(len(numbers), -1).astype(np.uint8)
    padded = np.pad(sequence, ((0, 0), (0, -sequence.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())
