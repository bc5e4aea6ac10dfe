"""The lock-step forward computes what the model in memory does, from weights that are read once and held briefly."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emloc_tools.errors import NumericalError
from emloc_tools.models.stream import LockStep
from emloc_tools.models.units import Unit
from tests import pico
from tests.models.streamed import (
    batches,
    checkpoint_bytes,
    in_memory,
    open_stream,
    outputs,
    stream_module,
    stream_outputs,
)


def assert_equal_outputs(streamed: list[tuple[torch.Tensor, ...]], expected: list[tuple[torch.Tensor, ...]]) -> None:
    """Bit for bit: both run the same operations on the same values in the same order."""
    for one, other in zip(streamed, expected, strict=True):
        assert len(one) == len(other) > 2
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert torch.equal(a, b), f"output {index} differs by {(a - b).abs().max():.2e}"


@pytest.mark.parametrize("family", list(pico.CLASSES))
def test_the_streamed_forward_equals_the_forward_in_memory_and_reads_every_weight_once(
    family: str, tmp_path: Path
) -> None:
    pico.save_model(tmp_path, family)
    model = in_memory(tmp_path)
    expected = [outputs(model, inputs) for inputs in batches()]

    stream = open_stream(tmp_path)
    assert_equal_outputs(stream_outputs(stream, batches()), expected)
    assert stream.weights.tensors.bytes_read == checkpoint_bytes(tmp_path)

    # Control: one changed weight shows in the last output.
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "attention" in name or "attn" in name).mul_(1.01)
    assert not torch.equal(outputs(model, batches()[0])[0], expected[0][0])


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_no_more_than_one_unit_and_the_shared_tensors_are_loaded_at_any_time(family: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path, family)
    stream = open_stream(tmp_path)
    seen: list[int] = []

    def count(*_: Any) -> None:
        loaded = {p.data_ptr(): p.nbytes for p in stream.model.parameters() if not p.is_meta}
        seen.append(sum(loaded.values()))

    for module in stream.model.modules():
        module.register_forward_hook(count)
    stream_outputs(stream, batches())

    def nbytes(units: list[Unit]) -> int:
        parameters = {id(p): p.nbytes for unit in units for p in unit.module.parameters()}
        return sum(parameters.values())

    largest = max(nbytes([unit]) for unit in stream.units)
    kept = sum(p.nbytes for name, p in stream.model.named_parameters() if name in stream._shared)
    assert largest <= max(seen) <= largest + kept
    assert largest + kept < checkpoint_bytes(tmp_path) / 1.5  # so the bound says something
    assert all(p.is_meta for p in stream.model.parameters())


def test_weights_of_a_finished_unit_are_garbage_when_the_next_one_runs(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream = open_stream(tmp_path)
    first, last = stream.model.model.layers[0], stream.model.model.layers[2]  # type: ignore[union-attr, index]
    alive: list[weakref.ref[Any]] = []
    dead: list[bool] = []
    first.mlp.register_forward_hook(lambda *_: alive.extend(weakref.ref(p) for p in first.parameters()))
    last.mlp.register_forward_hook(lambda *_: dead.extend(ref() is None for ref in alive))
    stream_outputs(stream, batches()[:1])
    assert len(dead) == len(list(first.parameters())) > 5
    assert all(dead)


def _boom(signalled: bool, failure: Exception) -> None:
    if not signalled:
        raise failure
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the interpreter raises KeyboardInterrupt between two of these
        pass


@pytest.mark.parametrize("signalled", [False, True], ids=["exception", "Ctrl-C"])
def test_an_exception_in_one_batch_surfaces_as_itself_and_unwinds_the_others(tmp_path: Path, signalled: bool) -> None:
    pico.save_model(tmp_path)
    expected = [outputs(in_memory(tmp_path), inputs) for inputs in batches()]
    stream = open_stream(tmp_path)
    failure = ValueError("batch 2 is broken")
    layer = stream.model.model.layers[1].mlp  # type: ignore[union-attr, index]
    started, unwound = [], []

    def call(index: int) -> None:
        started.append(index)
        try:
            outputs(stream.model, batches()[index])
        finally:
            unwound.append(index)

    def hook(*_: Any) -> None:
        if stream.current == 2:
            _boom(signalled, failure)

    handle = layer.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt if signalled else ValueError) as caught:
        stream.run([lambda index=index: call(index) for index in range(4)])  # type: ignore[misc]
    assert signalled or caught.value is failure
    assert sorted(started) == sorted(unwound) == [0, 1, 2, 3]
    assert all(p.is_meta for p in stream.model.parameters())
    assert not any(unit.loaded or unit.inside for unit in stream.units)
    assert torch.is_grad_enabled()

    handle.remove()
    assert_equal_outputs(stream_outputs(stream, batches()), expected)


@pytest.mark.parametrize("where", ["done", "on_leave", "on_unit_done"])
def test_an_exception_in_a_callback_surfaces_as_itself(tmp_path: Path, where: str) -> None:
    pico.save_model(tmp_path)
    stream = open_stream(tmp_path)
    failure = RuntimeError("the disk is full")

    def fail(*_: Any) -> None:
        raise failure

    done = fail if where == "done" else None
    if where != "done":
        setattr(stream, where, fail)
    with pytest.raises(RuntimeError) as caught:
        stream.run([lambda: outputs(stream.model, batches()[0])], done)
    assert caught.value is failure
    assert all(p.is_meta for p in stream.model.parameters())


def test_a_second_run_computes_the_same_again(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "llama-tied")
    stream = open_stream(tmp_path)
    first = stream_outputs(stream, batches())
    assert_equal_outputs(stream_outputs(stream, batches()), first)
    assert stream.weights.tensors.bytes_read == 2 * checkpoint_bytes(tmp_path)


def test_without_run_the_model_refuses_to_compute_and_after_close_it_is_free_of_hooks(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream = open_stream(tmp_path)
    with pytest.raises(RuntimeError, match=r"LockStep\.run"):
        stream.model(**batches()[0])
    stream.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stream.model.modules())


def test_blocks_above_the_limit_are_cut_into_their_children(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    expected = [outputs(in_memory(tmp_path), inputs) for inputs in batches()]
    whole = open_stream(tmp_path)
    block = next(unit for unit in whole.units if unit.name == "model.layers.0")
    size = sum(p.nbytes for p in block.module.parameters())
    attention = sum(p.nbytes for p in block.module.self_attn.parameters())  # type: ignore[union-attr]

    for limit, parts in ((size - 1, "self_attn"), (attention - 1, "self_attn.q_proj")):
        stream = open_stream(tmp_path, max_unit_bytes=limit)
        assert f"model.layers.0.{parts}" in [unit.name for unit in stream.units]
        assert_equal_outputs(stream_outputs(stream, batches()), expected)
        assert stream.weights.tensors.bytes_read == checkpoint_bytes(tmp_path)


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-moe"])
def test_sharded_and_single_file_checkpoints_agree(family: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "one", family)
    pico.save_model(tmp_path / "many", family, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = open_stream(tmp_path / "one"), open_stream(tmp_path / "many")
    assert_equal_outputs(stream_outputs(many, batches()), stream_outputs(one, batches()))
    assert one.weights.tensors.bytes_read == many.weights.tensors.bytes_read == checkpoint_bytes(tmp_path / "many")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gradients: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gradients.append(torch.is_grad_enabled())
        return x + self.b(torch.relu(self.a(x)))


class Unruly(nn.Module):
    """Its second block is entered by way of its children, and its head is a unit and a layer at once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.scale = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, gradients: bool = False) -> torch.Tensor:
        x = self.blocks[0](x * self.scale)
        x = x + self.blocks[1].b(torch.tanh(self.blocks[1].a(x)))  # type: ignore[operator]
        with torch.set_grad_enabled(gradients):
            x = self.blocks[2](x)
        return self.head(x)  # type: ignore[no-any-return]


def test_children_that_are_called_without_their_block_find_their_weights(tmp_path: Path) -> None:
    reference, stream = stream_module(Unruly, tmp_path)
    inputs = torch.randn(3, 5, 6)
    results: dict[int, torch.Tensor] = {}
    stream.run([lambda x=x: stream.model(x) for x in inputs], results.__setitem__)  # type: ignore[misc]
    for index, x in enumerate(inputs):
        with torch.no_grad():
            assert torch.equal(results[index], reference(x))
    assert stream.weights.tensors.bytes_read == checkpoint_bytes(tmp_path)


def test_on_leave_comes_while_the_weights_that_a_batch_used_are_still_loaded(tmp_path: Path) -> None:
    _, stream = stream_module(Unruly, tmp_path)
    used: dict[int, list[nn.Module]] = {}
    checked: list[tuple[int, str]] = []
    for module in stream.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: used.setdefault(stream.current, []).append(module))

    def leave(index: int, unit: Unit) -> None:
        for module in used.pop(index, []):
            assert not module.weight.is_meta  # type: ignore[union-attr, operator]
            checked.append((index, unit.name))

    stream.on_leave = leave
    stream.run([lambda x=x: stream.model(x) for x in torch.randn(2, 5, 6)])  # type: ignore[misc]
    blocks = [f"blocks.{number}" for number in range(3) for _ in range(2)]
    assert sorted(checked) == [(index, name) for index in range(2) for name in [*blocks, "head"]]
    assert not used


def test_the_gradient_mode_of_one_batch_does_not_reach_another(tmp_path: Path) -> None:
    _, stream = stream_module(Unruly, tmp_path)
    x = torch.randn(5, 6)
    modes = []
    stream.on_leave = lambda index, unit: modes.append(torch.is_grad_enabled())
    stream.run([lambda: stream.model(x, True), lambda: stream.model(x, False), lambda: stream.model(x, True)])
    blocks = stream.model.blocks
    assert blocks[2].gradients == [True, False, True]  # type: ignore[index]
    assert blocks[0].gradients == [False, False, False]  # type: ignore[index]
    assert modes
    assert not any(modes)
    assert torch.is_grad_enabled()


def test_parameters_of_no_unit_stay_loaded(tmp_path: Path) -> None:
    reference, stream = stream_module(Unruly, tmp_path)
    assert torch.equal(stream.model.scale, reference.scale)  # type: ignore[arg-type]


def test_nan_in_a_weight_is_refused_in_the_middle_of_a_run(tmp_path: Path) -> None:
    class Damaged(Unruly):
        def __init__(self) -> None:
            super().__init__()
            if not self.scale.is_meta:
                self.blocks[2].a.weight.data[1, 2] = torch.nan  # type: ignore[union-attr, operator]

    _, stream = stream_module(Damaged, tmp_path)
    with pytest.raises(NumericalError, match=r"blocks\.2\.a\.weight"):
        stream.run([lambda: stream.model(torch.randn(5, 6))])
    assert all(p.is_meta for name, p in stream.model.named_parameters() if name != "scale")


def test_an_output_that_is_a_view_of_a_weight_outlives_its_unit(tmp_path: Path) -> None:
    """The memory of a unit is reused for the next one, unless something still looks into it."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([_View() for _ in range(4)])

        def forward(self) -> list[torch.Tensor]:
            return [block() for block in self.blocks]

    reference, stream = stream_module(Views, tmp_path)
    results: list[list[torch.Tensor]] = []
    stream.run([stream.model], lambda _, result: results.append(result))
    for streamed, expected in zip(results[0], reference(), strict=True):
        assert torch.equal(streamed, expected)


class _View(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self) -> torch.Tensor:
        return self.weight[1:]


def test_current_is_refused_outside_a_run(tmp_path: Path) -> None:
    _, stream = stream_module(Unruly, tmp_path)
    with pytest.raises(RuntimeError, match="no batch is running"):
        _ = stream.current
    assert isinstance(stream, LockStep)
