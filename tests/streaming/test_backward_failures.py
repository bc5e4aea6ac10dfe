"""Whatever fails during the streamed backward surfaces as itself, and leaves the model and the disk as before."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools.errors import InputError
from emloc_tools.streaming.backward import BackwardLockStep
from tests import pico
from tests.streaming.backward_reference import calls, collect, distance, loss, open_backward


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the interpreter raises KeyboardInterrupt between two of these
        pass


def _raise() -> None:
    raise ValueError("broken")


def install(stream: BackwardLockStep, where: str, fail: Callable[[], None]) -> list[Any]:
    """Make the third batch fail at a place of the run; what is to be removed afterwards."""

    def failing(*_: Any) -> None:
        if stream.current == 2:
            fail()

    block = stream.model.get_submodule("model.layers.1.mlp")
    if where == "forward":
        return [block.register_forward_pre_hook(failing)]
    if where == "gradient":
        stream.on_gradient = lambda batch, gradient: fail() if "layers.1" in gradient.layer else None
    elif where == "unit done":
        stream.on_backward_unit_done = lambda unit: fail()
    return []


@pytest.mark.parametrize("fail", [_raise, _interrupt], ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize("where", ["forward", "loss", "gradient", "unit done"])
def test_failures_surface_as_themselves_and_leave_the_model_as_before(
    where: str, fail: Callable[[], None], tmp_path: Path
) -> None:
    pico.save_model(tmp_path, "llama-tied")
    stream, _ = open_backward(tmp_path)
    expected = collect(stream, calls(stream.model), loss)
    files = set(tmp_path.iterdir())
    hooks = {module: dict(module._forward_hooks) for module in stream.model.modules()}

    def failing_loss(batch: int, output: Any) -> torch.Tensor:
        if where == "loss" and batch == 2:
            fail()
        return loss(batch, output)

    stream.on_gradient = lambda *_: None
    handles = install(stream, where, fail)
    with pytest.raises(ValueError if fail is _raise else KeyboardInterrupt, match="broken" if fail is _raise else None):
        stream.run_backward(calls(stream.model), failing_loss)
    for handle in handles:
        handle.remove()
    stream.on_backward_unit_done = None

    assert all(p.is_meta for p in stream.model.parameters())
    assert not any(unit.loaded or unit.inside for unit in stream.units)
    assert torch.is_grad_enabled()
    assert set(tmp_path.iterdir()) == files
    assert {module: dict(module._forward_hooks) for module in stream.model.modules()} == hooks
    assert distance(collect(stream, calls(stream.model), loss), expected) == 0


def test_the_spilled_activations_never_bear_a_name(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream, _ = open_backward(tmp_path)
    files = set(tmp_path.iterdir())
    seen: list[bool] = []
    stream.on_gradient = lambda *_: seen.append(set(tmp_path.iterdir()) == files)
    stream.run_backward(calls(stream.model), loss)
    assert stream.spilled > 0
    assert seen
    assert all(seen)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_with_its_folder_and_a_remedy(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream, _ = open_backward(tmp_path)
    with (
        files_limited_to(20_000),
        pytest.raises(InputError, match="larger disk, or fewer or shorter samples") as caught,
    ):
        stream.run_backward(calls(stream.model), loss)
    assert str(tmp_path) in str(caught.value)
    stream.run_backward(calls(stream.model), loss)
    assert stream.spilled > 20_000


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream, _ = open_backward(tmp_path)
    stream._folder = tmp_path / "missing"
    with pytest.raises(InputError, match=r"cannot write into .*missing"):
        stream.run_backward(calls(stream.model), loss)
