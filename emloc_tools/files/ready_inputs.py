"""Write ready model inputs, the tensors `<n>/<argument>` of one safetensors file, as they come.

How many there will be is known at the end only, and the file's header comes first. So tensors go to a spool beside it,
in memory is one at a time, and the file appears under its name when it is complete.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from emloc_tools.errors import InputError
from emloc_tools.files.tensors import DTYPE_NAMES, ShardedWriter, TensorSpec, as_bytes

TARGET = "target"  # a tensor that a loss compares the model's output with; no argument
Place = tuple[int, TensorSpec]  # where a tensor starts in the spool; its name there is that of the argument


class InputSpool:
    """Calls of a model, each a set of tensors by argument, on disk until it is known which are kept."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._end = file, 0
        self.calls: list[dict[str, Place]] = []

    def add(self, arguments: Mapping[str, torch.Tensor]) -> None:
        """One more call."""
        self.calls.append({})
        for argument, tensor in arguments.items():
            self.add_to_last(argument, tensor)

    def add_to_last(self, argument: str, tensor: torch.Tensor) -> None:
        """One more tensor of the last call. Raises `InputError` for a dtype that safetensors does not have."""
        if tensor.dtype not in DTYPE_NAMES:
            raise InputError(f"the argument {argument} is of {tensor.dtype}, which cannot be stored in safetensors")
        tensor = tensor.detach().cpu().contiguous()
        spec = TensorSpec(argument, tensor.dtype, tuple(tensor.shape))
        self._file.seek(self._end)
        self._file.write(as_bytes(tensor))
        self.calls[-1][argument] = (self._end, spec)
        self._end += spec.nbytes

    def keep(self, start: int, chosen: list[int]) -> None:
        """Forget the calls from `start` on, but for those whose places in `calls` are `chosen`, ascending.

        What was written after the last one that stays is overwritten by what comes.
        """
        self.calls[start:] = [self.calls[place] for place in chosen]
        self._end = max(begin + spec.nbytes for begin, spec in self.calls[-1].values())

    def read(self, place: Place) -> torch.Tensor:
        """A tensor of a call."""
        begin, spec = place
        buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
        self._file.seek(begin)
        self._file.readinto(as_bytes(buffer))  # type: ignore[attr-defined]
        return buffer.view(spec.dtype).view(spec.shape)


@contextlib.contextmanager
def new_inputs(path: Path, *, overwrite: bool = False) -> Iterator[InputSpool]:
    """A spool whose calls become the file `path`, numbered in their order, unless an exception ends the block.

    Raises `InputError` for a name that is taken, unless `overwrite` replaces it, a folder that cannot be written
    into, and for no calls at all.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path} must be called *.safetensors, by which ready model inputs are known")
    if path.exists() and not overwrite:
        raise InputError(f"{path} already exists; choose another name, or pass overwrite=True to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write into {path.parent}: {error.strerror or error}") from error
    try:
        with (partial / "spool").open("w+b") as file:
            spool = InputSpool(file)
            yield spool
            if not spool.calls:
                raise InputError(f"nothing was recorded for {path}: the module was not called")
            _write(spool, partial, path)
        (partial / path.name).replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(spool: InputSpool, folder: Path, path: Path) -> None:
    places = {f"{n}/{name}": place for n, call in enumerate(spool.calls) for name, place in call.items()}
    specs = [TensorSpec(name, spec.dtype, spec.shape) for name, (_, spec) in places.items()]
    writer = ShardedWriter(folder, path.stem, specs, max_shard_size=1 << 62)
    try:
        for name, place in places.items():
            writer.write(name, spool.read(place))
        writer.finish()
    finally:
        writer.close()
