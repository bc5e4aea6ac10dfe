"""Unsigned integers of a few bits as GPTQ and AWQ store them, in 32-bit words.

Number i of a row or column takes the bits from `i * bits` on, counted from the lowest bit of the first word. With 3
bits some numbers straddle two words; otherwise a word holds 32 / bits of them.
"""

from __future__ import annotations

import torch

WORD = 32


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The numbers that the int32 matrix `words` holds along `dim`: int32, `32 / bits` times as many."""
    packed = words.movedim(dim, -1)
    count = packed.shape[-1] * WORD // bits
    places = torch.arange(count) * bits
    word, shift = places // WORD, (places % WORD).to(torch.int32)
    # An arithmetic shift fills with the sign bit; the mask takes that away, as every number is shorter than a word.
    numbers = packed[..., word] >> shift
    straddles = shift > WORD - bits
    if straddles.any():
        low = WORD - shift[straddles]  # bits in the first of the two words
        numbers[..., straddles] &= (1 << low) - 1
        numbers[..., straddles] |= packed[..., word[straddles] + 1] << low
    return (numbers & ((1 << bits) - 1)).movedim(-1, dim)
