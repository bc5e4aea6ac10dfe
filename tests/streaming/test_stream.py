"""The lock-step forward computes what the model in memory does, from weights that are read once and held briefly."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools.streaming.units import Unit
from tests import pico
from tests.streaming.streamed import (
    batches,
    checkpoint_bytes,
    in_memory,
    open_stream,
    outputs,
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
