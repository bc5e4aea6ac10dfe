"""The memory of one unit serves the next: aligned, reused, and not before the last look into it is gone."""

from __future__ import annotations

import torch

from emloc_tools.streaming.memory import ALIGNMENT, Arena


def test_pieces_are_aligned_apart_and_of_the_wanted_size() -> None:
    sizes = [1, 100, 64, 7, 0, 5000]
    arena = Arena()
    arena.reserve(sizes)
    pieces = [arena.take(size) for size in sizes]
    for value, piece in enumerate(pieces):
        piece.fill_(value)
    for value, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert (piece.dtype, piece.shape) == (torch.uint8, (size,))
        assert size == 0 or piece.data_ptr() % ALIGNMENT == 0
        assert bool((piece == value).all())


def test_the_memory_is_reused_when_it_is_large_enough() -> None:
    arena = Arena()
    arena.reserve([1000, 1000])
    first = arena.take(1000).data_ptr()
    arena.reserve([500])
    assert arena.take(500).data_ptr() == first
    arena.reserve([100_000])
    last = arena.take(100_000)
    last.fill_(3)  # all of it is there
    assert int(last.sum(dtype=torch.int64)) == 300_000


def test_an_arena_is_idle_once_no_tensor_looks_into_it() -> None:
    arena = Arena()
    assert arena.idle
    arena.reserve([64])
    assert arena.idle
    piece = arena.take(64)
    view = piece.view(torch.float32)[3:5]
    del piece
    assert not arena.idle
    del view
    assert arena.idle
