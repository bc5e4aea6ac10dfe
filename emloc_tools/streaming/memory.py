"""Memory that stays flat while weights come and go: a reused block for a unit's tensors, and a quiet C heap."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 64  # bytes; suits every dtype and vector instruction


class Arena:
    """Reused memory for the plain tensors of one unit, so that reading neither allocates nor fragments the heap."""

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.uint8)
        self._used = 0
        self._idle_references = sys.getrefcount(self._block)

    def reserve(self, sizes: Sequence[int]) -> None:
        """Make room for tensors of the given sizes in bytes and start anew."""
        needed = sum(_aligned(size) for size in sizes)
        if needed + ALIGNMENT > self._block.size:
            self._block = np.empty(needed + ALIGNMENT, dtype=np.uint8)
        address = self._block.__array_interface__["data"][0]
        self._used = _aligned(address) - address

    def take(self, size: int) -> torch.Tensor:
        """The next `size` bytes, as a 1-D uint8 tensor."""
        piece = torch.from_numpy(self._block[self._used : self._used + size])
        self._used += _aligned(size)
        return piece

    @property
    def idle(self) -> bool:
        """Whether no tensor outside still looks into the memory, such as a module's output that is its own weight."""
        return sys.getrefcount(self._block) <= self._idle_references


def keep_heap_flat() -> None:
    """Fix glibc's threshold above which memory is mapped, and so given back at once when freed.

    By default the threshold grows with use, blocks go to the heap, and the resident size creeps up with depth.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            m_mmap_threshold = -3
            ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


def give_heap_back() -> None:
    """Return unused pages in the middle of glibc's heap to the system: small objects between them hold it open."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
