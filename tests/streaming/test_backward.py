"""The streamed backward: precision, choice of layers, what is loaded when, callbacks, observers and hooks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emloc_tools.models.base import open_base
from emloc_tools.models.layers import select_layers
from emloc_tools.streaming.backward import BackwardLockStep
from emloc_tools.streaming.observe import Observer
from tests import pico
from tests.streaming.backward_reference import (
    EXACT,
    Calls,
    Gradients,
    calls,
    collect,
    count_reads,
    distance,
    family_in_memory,
    loss,
    open_backward,
    reference,
)
from tests.streaming.streamed import batches, checkpoint_bytes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_gradients_are_those_of_the_same_model_in_memory(family: str, tmp_path: Path) -> None:
    """Both round at the same places, and the squares are sums in float32."""
    pico.save_model(tmp_path, family, dtype=torch.bfloat16)
    model = family_in_memory(tmp_path, torch.bfloat16)
    stream, layers = open_backward(tmp_path, dtype="bfloat16")
    expected = reference(model, layers, calls(model), loss)
    found = collect(stream, calls(stream.model), loss)
    assert {rows.dtype for tensors in found.rows.values() for rows in tensors} == {torch.bfloat16}
    assert {squares.dtype for tensors in found.squares.values() for squares in tensors} == {torch.float32}
    streamed_error = distance(found, expected)
    exact = reference(family_in_memory(tmp_path), layers, calls(family_in_memory(tmp_path)), loss)
    assert streamed_error < 1e-5
    assert distance(expected, exact) > 1e-3, "the control: rounding shows"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_loss_of_all_hidden_states_is_differentiated(family: str, tmp_path: Path) -> None:
    """transformers collects them by hooks on the blocks, which see the blocks' results as parts of the graph."""

    def states(model: Any) -> Calls:
        return [lambda inputs=inputs: model(**inputs, output_hidden_states=True) for inputs in batches()]  # type: ignore[misc]

    def spread(batch: int, output: Any) -> torch.Tensor:
        return sum(state.std() for state in output.hidden_states) + output.logits.std()  # type: ignore[no-any-return]

    pico.save_model(tmp_path, family)
    model = family_in_memory(tmp_path)
    model.config.use_cache = False
    stream, layers = open_backward(tmp_path)
    stream.model.config.use_cache = False  # type: ignore[union-attr]
    expected = reference(model, layers, states(model), spread)
    assert distance(collect(stream, states(stream.model), spread), expected) < EXACT
    last = reference(model, layers, states(model), lambda batch, output: output.logits.std())
    assert distance(last, expected) > 0.01, "the control: the hidden states matter"


def test_chosen_layers_alone_report_and_nothing_below_the_lowest_is_read_again(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    model = family_in_memory(tmp_path)
    stream, layers = open_backward(tmp_path, targets=r"layers\.1\.(mlp|self_attn\.q_proj)")
    assert len(layers) == 4
    reads = count_reads(stream)
    found = collect(stream, calls(stream.model), loss)
    assert distance(found, reference(model, layers, calls(model), loss)) < EXACT
    twice = {name for name, count in reads.items() if count == 2}
    assert twice == {name for name in reads if "layers.1." in name or "layers.2." in name or "model.norm" in name}
    assert set(reads.values()) == {1, 2}


def test_the_units_are_loaded_one_at_a_time_in_both_directions(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "llama-tied")
    stream, _ = open_backward(tmp_path)
    seen: dict[str, list[int]] = {"forward": [], "backward": []}

    def loaded() -> int:
        held = [*(p for p in stream.model.parameters() if not p.is_meta), *stream._kept.values()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())

    for module in stream.model.modules():
        module.register_forward_hook(lambda *_: seen["forward"].append(loaded()))
    stream.on_gradient = lambda *_: seen["backward"].append(loaded())
    stream.run_backward(calls(stream.model), loss)
    sizes = {unit.name: sum(p.nbytes for p in unit.module.parameters()) for unit in stream.units}
    tied, block = sizes["lm_head"], sizes["model.layers.0"]
    assert max(seen["forward"]) == tied + block, "the embeddings stay after their first use"
    assert set(seen["backward"]) == {tied, block}, "and go when the head has been reversed"
    assert sum(sizes.values()) - tied > 1.9 * (tied + block)  # the whole model, in which embeddings and head are one
    assert all(p.is_meta for p in stream.model.parameters())


def test_callbacks_of_the_forward_see_every_unit_once_and_those_of_the_backward_in_reverse(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream, _ = open_backward(tmp_path)
    events: list[str] = []
    left: Counter[tuple[int, str]] = Counter()
    stream.on_leave = lambda batch, unit: left.update([(batch, unit.name)])
    stream.on_unit_done = lambda unit: events.append(f"forward {unit.name}")
    stream.on_backward_unit_done = lambda unit: events.append(f"backward {unit.name}")
    stream.on_gradient = lambda batch, gradient: events.append(gradient.layer)
    stream.run_backward(calls(stream.model), loss)

    names = [unit.name for unit in stream.units]
    assert [event for event in events if event.startswith("forward")] == [f"forward {name}" for name in names]
    recorded = ["model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    done = [event for event in events if event.startswith("backward")]
    assert done == [f"backward {name}" for name in reversed(recorded)]
    assert left == Counter({(batch, name): 1 for batch in range(4) for name in names})
    for name in ("model.layers.0", "model.layers.2", "lm_head"):
        last = max(place for place, event in enumerate(events) if event.startswith(name))
        assert last < events.index(f"backward {name}")


@pytest.mark.parametrize("family", ["llama", "albert"])
def test_an_observer_sees_the_forward_once_and_nothing_of_the_recomputation(family: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path, family)
    stream, layers = open_backward(tmp_path)
    found: Counter[tuple[int, str]] = Counter()
    inputs: dict[tuple[int, str], list[torch.Tensor]] = {}
    observer = Observer(
        stream.model,
        [layer.name for layer in layers],
        current=lambda: stream.current,
        mask=lambda *_: None,
        wanted=lambda name: frozenset({"input"}),
    )

    def leave(batch: int, unit: Any) -> None:
        for reading in observer.take(batch):
            for name in reading.layers:
                found[batch, name] += 1
                assert reading.inputs is not None
                inputs.setdefault((batch, name), []).append(reading.inputs.detach())

    stream.on_leave = leave
    stream.run_backward(calls(stream.model), loss)
    assert not observer.batches()

    model = family_in_memory(tmp_path)
    expected: dict[tuple[int, str], list[torch.Tensor]] = {}
    running = iter(range(len(calls(model))))
    for layer in layers:
        model.get_submodule(layer.name).register_forward_hook(
            lambda module, args, output, name=layer.name: expected.setdefault((batch, name), []).append(args[0])
        )
    for call in calls(model):
        batch = next(running)
        call()
    assert found == {key: len(tensors) for key, tensors in expected.items()}
    for key, tensors in expected.items():
        for mine, theirs in zip(inputs[key], tensors, strict=True):
            assert torch.equal(mine, theirs.detach().reshape(mine.shape))


def test_hooks_that_were_there_before_belong_to_the_model_and_are_run_again(tmp_path: Path) -> None:
    """The control of the test above, and the reason for its rule: such a hook may change what a layer computes."""
    pico.save_model(tmp_path)
    model = family_in_memory(tmp_path)
    doubled = "model.layers.1.mlp.up_proj"
    ran = []

    def double(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return 2 * output

    plain, layers = open_backward(tmp_path)
    model.get_submodule(doubled).register_forward_hook(double)
    expected = reference(model, layers, calls(model), loss)
    hooked, _ = open_backward_with_hook(tmp_path, doubled, double)
    ran.clear()
    found = collect(hooked, calls(hooked.model), loss)
    assert len(ran) == 2 * len(batches())
    rows = {key: value for key, value in expected.rows.items() if key[1] != doubled}
    kept = {key: value for key, value in found.rows.items() if key[1] != doubled}
    assert distance(Gradients(kept, losses=found.losses), Gradients(rows, losses=expected.losses)) < EXACT
    assert distance(collect(plain, calls(plain.model), loss), found) > 0.01


def open_backward_with_hook(folder: Path, name: str, hook: Any) -> tuple[BackwardLockStep, Any]:
    opened = open_base(str(folder), dtype="float64")
    opened.model.get_submodule(name).register_forward_hook(hook)
    layers = select_layers(opened.model, targets=".")
    return BackwardLockStep(opened.model, opened.weights(), layers, spill=folder), layers


def test_blocks_above_the_limit_are_differentiated_in_parts(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    model = family_in_memory(tmp_path)
    stream, layers = open_backward(tmp_path, max_unit_bytes=1)
    assert "model.layers.0.self_attn.q_proj" in [unit.name for unit in stream.units]
    reads = count_reads(stream)
    found = collect(stream, calls(stream.model), loss)
    assert distance(found, reference(model, layers, calls(model), loss)) < EXACT
    assert set(reads.values()) <= {1, 2}


def test_a_plain_forward_through_the_same_object_records_nothing(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    model = family_in_memory(tmp_path)
    stream, _ = open_backward(tmp_path)
    results: dict[int, Any] = {}
    stream.run(calls(stream.model), results.__setitem__)
    for index, call in enumerate(calls(model)):
        with torch.no_grad():
            assert torch.equal(results[index].logits, call().logits)
    assert stream.spilled == 0
    assert stream.weights.tensors.bytes_read == checkpoint_bytes(tmp_path)


def test_a_second_run_gives_the_same_and_close_restores_the_model(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "llama-tied")
    stream, _ = open_backward(tmp_path)
    first = collect(stream, calls(stream.model), loss)
    assert distance(collect(stream, calls(stream.model), loss), first) == 0
    assert any("forward" in module.__dict__ for module in stream.model.modules())
    stream.close()
    assert not any("forward" in module.__dict__ for module in stream.model.modules())
