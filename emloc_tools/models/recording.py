"""Record what a module is called with, as ready model inputs for `calibrate`: of any model, from any program."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.ready_inputs import TARGET, InputSpool, new_inputs

OF_OUTPUT = frozenset({"return_dict"})  # arguments that say in which form results come


class Recorder:
    """Takes in the calls of a module. See `record_inputs`."""

    def __init__(self, spool: InputSpool, module: nn.Module, per_run: int | None, seed: int) -> None:
        self._spool, self._module = spool, module
        self._signature = inspect.signature(type(module).forward)
        self._per_run, self._random = per_run, random.Random(seed)
        self._noise = torch.Generator().manual_seed(seed)

    @property
    def calls(self) -> int:
        """How many calls will be in the file."""
        return len(self._spool.calls)

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Of the calls inside, keep `per_run`, one from each of as many equal stretches of them, chosen by `seed`."""
        start = self.calls
        yield
        count = self.calls - start
        if self._per_run is not None and count > self._per_run:
            edges = [start + count * number // self._per_run for number in range(self._per_run + 1)]
            chosen = [self._random.randrange(low, high) for low, high in itertools.pairwise(edges)]
            self._spool.keep(start, chosen)

    def target(self, tensor: torch.Tensor) -> None:
        """What the output of the last call is to be, such as the velocity or noise that a training step predicts."""
        if not self._spool.calls:
            raise InputError("a target belongs to a call of the module, and there was none yet")
        if TARGET in self._spool.calls[-1]:
            raise InputError("the last call has a target already")
        self._spool.add_to_last(TARGET, tensor)

    def probe(self, output: Any) -> None:
        """Give the last call the target `output` plus noise."""
        found = output if isinstance(output, torch.Tensor) else output[0]
        if not (isinstance(found, torch.Tensor) and found.is_floating_point()):
            raise UnsupportedError(
                f"{type(self._module).__name__} returns {type(output).__name__}, which begins with no tensor to "
                "compare with; record it without probe"
            )
        self.target(found.detach().float().cpu() + torch.randn(found.shape, generator=self._noise))

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take in a call."""
        bound = self._signature.bind(self._module, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
            elif parameter.kind is parameter.VAR_POSITIONAL and given.pop(name, ()):
                raise self._unsupported(name, "positional arguments without a name")
        tensors = {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif _holds_tensors(value):
                tensors |= {f"{name}.{key}": tensor for key, tensor in value.items() if tensor is not None}
            elif name not in OF_OUTPUT and not self._is_default(name, value):
                raise self._unsupported(name, reprlib.repr(value))
        if TARGET in tensors:
            raise UnsupportedError(
                f"{type(self._module).__name__} has an argument {TARGET}, by which ready model inputs name what the "
                "output is to be; such a module cannot be recorded"
            )
        self._spool.add(tensors)

    def _is_default(self, name: str, value: Any) -> bool:
        """Whether leaving the argument out means the same. An empty collection, or one of nothing, is None."""
        parameter = self._signature.parameters.get(name)
        default = None if parameter is None or parameter.default is parameter.empty else parameter.default
        if isinstance(value, (list, tuple, Mapping)):
            inner = value.values() if isinstance(value, Mapping) else value
            return default is None and all(each is None for each in inner)
        return type(value) is type(default) and bool(value == default)

    def _unsupported(self, name: str, value: str) -> UnsupportedError:
        return UnsupportedError(
            f"{type(self._module).__name__} was called with {name}={value}; ready model inputs hold tensors by "
            "argument, and calibrate would run without this one. Call the module without it, or with a tensor"
        )


def _holds_tensors(value: Any) -> bool:
    """Whether an argument is a dictionary of tensors by names, such as the embeddings that SDXL's unet takes."""
    return (
        isinstance(value, Mapping)
        and any(each is not None for each in value.values())
        and all(isinstance(each, torch.Tensor) for each in value.values() if each is not None)
        and all(isinstance(key, str) and re.fullmatch(r"\w+", key) for key in value)
    )


@contextlib.contextmanager
def record_inputs(
    module: nn.Module,
    path: str | Path,
    *,
    per_run: int | None = None,
    probe: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> Iterator[Recorder]:
    """Write the arguments of every call of `module` inside the block to `path`, for `calibrate --data`.

    Tensors are stored as they are, `<n>/<argument>` for the n-th call (`<n>/<argument>.<key>` where an argument is a
    dictionary of them), one call at a time; the file appears when the block ends without an exception. Inside `with
    recorder.run():`, such as one run of a pipeline with its tens of timesteps, only `per_run` calls are kept, spread
    evenly. `recorder.target(tensor)` adds what the last output is to be; then `calibrate --gradients` has a loss, the
    squared error. With `probe` that is the output itself plus noise of unit variance in every entry: the gradients'
    second moments are then, on average, those by which small errors at a layer grow or shrink on their way to the
    output, whatever the output should be.

    Raises `InputError` for an unusable `path`, or if the module was not called; `UnsupportedError` for a call with
    anything that changes the result and is no tensor. The call itself then raises it.
    """
    if per_run is not None and per_run < 1:
        raise InputError(f"per_run is {per_run}; at least one call of a run must be kept")
    with new_inputs(Path(path), overwrite=overwrite) as spool:
        recorder = Recorder(spool, module, per_run, seed)
        handles: list[Any] = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs: recorder.record(args, kwargs), with_kwargs=True
            )
        ]
        if probe:
            handles.append(module.register_forward_hook(lambda module, args, output: recorder.probe(output)))
        try:
            yield recorder
        finally:
            for handle in handles:
                handle.remove()
