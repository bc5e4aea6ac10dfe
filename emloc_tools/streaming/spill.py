"""Tensors on disk instead of in memory: one append-only file without a name, gone when it is closed."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from emloc_tools.errors import InputError

ALIGNMENT = 64  # bytes
LARGEST_TRANSFER = 1 << 30  # bytes; Linux moves at most 2 GiB per call
REMEMBERED = 4096  # tensors; then those whose memory is gone are forgotten


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file, and how to make it again.

    `order` lists its dimensions from the slowest to the fastest in memory. `stored` is the shape in that order with
    expanded dimensions (stride 0) once, `shape` the whole shape in that order.
    """

    offset: int
    nbytes: int
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]
    stored: tuple[int, ...]
    shape: tuple[int, ...]


class Spill:
    """An unlinked file in `folder`: whatever happens, nothing is left behind.

    The same memory in the same state is written once, however many tensors look at it. `written` counts all bytes
    written. Not for several threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by close
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error
        self.size = 0
        self.written = 0
        # By the address of a storage. The weak reference keeps the address from being given to another one.
        self._known: dict[int, tuple[StorageWeakRef, dict[tuple[object, ...], Stored]]] = {}

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()
        self._known.clear()

    def save(self, tensor: torch.Tensor) -> Stored:
        """Append a tensor, or find it. Raises `InputError` when the disk is full."""
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if tensor.is_inference():  # such tensors do not tell whether they were changed
            return self._append(tensor)
        known = self._known.get(storage._cdata)
        if known is None or known[0].expired():  # type: ignore[no-untyped-call]
            known = self._known[storage._cdata] = (StorageWeakRef(storage), {})  # type: ignore[no-untyped-call]
        key = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key not in known[1]:
            known[1][key] = self._append(tensor)
        if len(self._known) > REMEMBERED:
            alive = [(key, entry) for key, entry in self._known.items() if not entry[0].expired()]  # type: ignore[no-untyped-call]
            self._known = dict(alive)
        return known[1][key]

    def forget(self, tensor: torch.Tensor) -> None:
        """Take the memory of a tensor for new: another tensor may look at it whose version says nothing of its past."""
        self._known.pop(tensor.untyped_storage()._cdata, None)

    def load(self, stored: Stored) -> torch.Tensor:
        """A new tensor with the values, the device and the order in memory of the one saved."""
        buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        while done < stored.nbytes:
            try:
                count = os.preadv(self._file.fileno(), [view[done : done + LARGEST_TRANSFER]], stored.offset + done)
            except OSError as error:
                raise InputError(f"cannot read a temporary file in {self._folder}: {error.strerror}") from error
            if count == 0:
                raise InputError(f"a temporary file in {self._folder} ended before its time; is the disk damaged?")
            done += count
        values = buffer.view(stored.dtype) if stored.nbytes else torch.empty(0, dtype=stored.dtype)
        whole = values.view(stored.stored).to(stored.device).expand(stored.shape)
        return whole.permute([stored.order.index(place) for place in range(len(stored.order))])

    def truncate(self, size: int) -> None:
        """Forget what was appended after the file had `size` bytes."""
        os.ftruncate(self._file.fileno(), size)
        self.size = size
        self._known.clear()

    def _append(self, tensor: torch.Tensor) -> Stored:
        # The order in memory is kept: code may rely on a transposed tensor becoming contiguous by transposing it back.
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda place: -strides[place]))
        ordered = tensor.permute(order)
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in ordered.stride())
        values = ordered[once].to("cpu").contiguous()
        stored = Stored(
            offset=self.size,
            nbytes=values.nbytes,
            dtype=tensor.dtype,
            device=tensor.device,
            order=order,
            stored=tuple(values.shape),
            shape=tuple(ordered.shape),
        )
        if values.nbytes:
            flat = values.as_strided((values.numel(),), (1,))  # a single value may have stride 0
            self._write(flat.view(torch.uint8).numpy().data, stored.offset)
        self.size += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
        self.written += values.nbytes
        return stored

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                piece = data[done : done + LARGEST_TRANSFER]
                done += os.pwrite(self._file.fileno(), piece, offset + done)
            except OSError as error:
                raise InputError(
                    f"cannot write activations into {self._folder} after {(offset + done) / 1e9:.1f} GB: "
                    f"{error.strerror or error}; choose an --output on a larger disk, or fewer or shorter samples"
                ) from error
