"""The tensors of a quantised checkpoint as those of a full-precision one, dequantised one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch

from emloc_tools.files.tensors import TensorFolder, TensorSpec


class DequantisedFolder(TensorFolder):
    """A checkpoint whose quantised tensors are read in `dtype`; what belongs to them, such as scales, is not shown.

    `stored` maps the name of every tensor that is shown to a stored tensor in whose file it is. `bytes_read` counts
    what is read from the files. Each way of quantising is a subclass.
    """

    def __init__(self, raw: TensorFolder, stored: dict[str, str], dtype: torch.dtype) -> None:
        super().__init__({name: raw.weight_map[place] for name, place in stored.items()}, locate=_by_raw)
        self._raw, self._dtype = raw, dtype

    @abstractmethod
    def quantised_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor that is stored quantised; None for one that is stored as it is."""

    @abstractmethod
    def dequantised(self, name: str) -> torch.Tensor:
        """A quantised tensor in full precision, of any dtype: `read` rounds it to the folder's."""

    def spec(self, name: str) -> TensorSpec:
        shape = self.quantised_shape(name)
        self.bytes_read = self._raw.bytes_read  # a shape may be in a tensor
        return self._raw.spec(name) if shape is None else TensorSpec(name, self._dtype, shape)

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        if self.quantised_shape(name) is None:
            tensor = self._raw.read(name, buffer)
        else:
            spec, W = self.spec(name), self.dequantised(name)
            if buffer is None:
                tensor = W.to(self._dtype)
            else:
                tensor = buffer[: spec.nbytes].view(spec.dtype).view(spec.shape).copy_(W)
        self.bytes_read = self._raw.bytes_read
        return tensor

    def check_placement(self) -> None:
        self._raw.check_placement()

    def close(self) -> None:
        self._raw.close()


def without(names: Iterable[str], hidden: Iterable[str]) -> dict[str, str]:
    """The `stored` of a folder that shows `names` but those that are `hidden`, each under its own name."""
    left_out = frozenset(hidden)
    return {name: name for name in names if name not in left_out}


def _by_raw(name: str) -> Path:
    raise AssertionError(f"{name} is opened by the folder of stored tensors")
