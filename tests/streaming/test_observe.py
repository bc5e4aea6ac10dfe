"""The observer sees the rows that linear layers read and write, without padding, and which layers share a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emloc_tools.models.layers import select_layers
from emloc_tools.streaming.observe import Observer, Reading
from tests import pico
from tests.streaming.streamed import batches, in_memory, open_stream, outputs, stream_module

BOTH = frozenset({"input", "output"})
Grams = dict[str, torch.Tensor]


def reference_grams(model: Any, names: list[str], *, masked: bool = True) -> tuple[Grams, Grams, dict[str, int]]:
    """XᵀX and YᵀY in float64, and tokens, of every layer, by forward hooks on a model in memory."""
    inputs: Grams = {}
    written: Grams = {}
    tokens: dict[str, int] = {}
    mask: torch.Tensor | None = None

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            rows = slice(None) if mask is None else mask.reshape(-1)
            for grams, tensor in ((inputs, args[0]), (written, output)):
                x = tensor.reshape(-1, tensor.shape[-1])[rows].double()
                grams[name] = grams.get(name, 0) + x.T @ x
            tokens[name] = tokens.get(name, 0) + x.shape[0]

        return see

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    for made in batches():
        mask = made["attention_mask"].bool() if masked and "attention_mask" in made else None
        outputs(model, made)
    return inputs, written, tokens


def observe(folder: Path, names: list[str], *, masked: bool = True) -> list[list[Reading]]:
    """All readings of a streamed run over the batches, by batch."""
    stream = open_stream(folder)
    made = batches()
    readings: list[list[Reading]] = [[] for _ in made]

    def mask(batch: int, *_: Any) -> torch.Tensor | None:
        found = made[batch].get("attention_mask")
        return found.bool() if masked and found is not None else None

    observer = Observer(stream.model, names, current=lambda: stream.current, mask=mask, wanted=lambda name: BOTH)
    stream.on_leave = lambda batch, unit: readings[batch].extend(observer.take(batch))
    stream.run([lambda inputs=inputs: outputs(stream.model, inputs) for inputs in made])
    assert observer.batches() == []
    observer.close()
    return readings


def observed_grams(readings: list[list[Reading]]) -> tuple[Grams, Grams, dict[str, int]]:
    """The sums of XᵀX and YᵀY in float64 and of rows over all readings, by layer."""
    inputs: Grams = {}
    written: Grams = {}
    tokens: dict[str, int] = {}
    for reading in (reading for batch in readings for reading in batch):
        assert reading.inputs is not None
        x = reading.inputs.double()
        for name in reading.layers:
            y = reading.outputs[name].double()
            inputs[name] = inputs.get(name, 0) + x.T @ x
            written[name] = written.get(name, 0) + y.T @ y
            tokens[name] = tokens.get(name, 0) + x.shape[0]
    return inputs, written, tokens


def relative(one: Grams, other: Grams) -> float:
    """The largest relative difference of two sets of Grams, in the Frobenius norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert", "gemma3", "qwen3-moe"])
def test_grams_of_what_layers_see_equal_those_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    model = pico.save_model(tmp_path, family)
    names = [layer.name for layer in select_layers(model) if layer.experts is None]
    expected = reference_grams(in_memory(tmp_path), names)
    inputs, written, tokens = observed_grams(observe(tmp_path, names))
    # Rows are equal bit for bit; only the order of float64 sums differs.
    assert relative(inputs, expected[0]) < 1e-13
    assert relative(written, expected[1]) < 1e-13
    assert tokens == expected[2]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_rows_never_count(family: str, tmp_path: Path) -> None:
    model = pico.save_model(tmp_path, family)
    names = [layer.name for layer in select_layers(model)]
    readings = observe(tmp_path, names)
    real = [int(made.get("attention_mask", torch.ones_like(made["input_ids"])).sum()) for made in batches()]
    for index, batch in enumerate(readings):
        assert {len(reading.inputs) for reading in batch if reading.inputs is not None} == {real[index]}
        assert {len(rows) for reading in batch for rows in reading.outputs.values()} == {real[index]}
    # Control: padding counted, the Grams differ in every layer.
    unmasked, _, _ = observed_grams(observe(tmp_path, names, masked=False))
    expected, _, _ = reference_grams(in_memory(tmp_path), names)
    assert min(float((unmasked[name] - expected[name]).norm() / expected[name].norm()) for name in names) > 0.01


def test_layers_that_read_one_tensor_share_a_reading(tmp_path: Path) -> None:
    model = pico.save_model(tmp_path)
    names = [layer.name for layer in select_layers(model)]
    for batch in observe(tmp_path, names):
        groups = [[name.removeprefix("model.layers.") for name in reading.layers] for reading in batch]
        assert groups == [
            [f"{block}.{part}" for part in parts]
            for block in range(3)
            for parts in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
            )
        ]


class Readers(nn.Module):
    """Layers that read one tensor, a view of it, a copy of it, and what becomes of it by an in-place change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> None:
        a, same, view, copy, changed, again = self.layers
        a(x), same(x)
        view(x.view(1, *x.shape))
        copy(x.clone())
        x.add_(1)
        changed(x)
        again(x)
        again(x)


def _observe_module(module: nn.Module, x: torch.Tensor) -> list[Reading]:
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    observer = Observer(module, names, current=lambda: 0, mask=lambda *_: None, wanted=lambda _: BOTH)
    with torch.no_grad():
        module(x)
    return observer.take(0)


def test_equal_values_and_changed_memory_are_not_the_same_tensor() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    before = x.clone()
    readings = _observe_module(Readers(), x)
    assert [reading.layers for reading in readings] == [
        ["layers.0", "layers.1", "layers.2"],
        ["layers.3"],
        ["layers.4", "layers.5"],
        ["layers.5"],  # a layer's second call is a reading of its own: its rows count twice
    ]
    assert [torch.equal(reading.inputs, before) for reading in readings] == [True, True, False, False]  # type: ignore[arg-type]
    assert torch.equal(readings[2].inputs, before + 1)  # type: ignore[arg-type]


def test_empty_tensors_are_not_taken_for_one() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, x: torch.Tensor) -> None:
            for layer in self.layers:
                layer(x[torch.zeros(len(x), dtype=torch.bool)])

    assert [reading.layers for reading in _observe_module(Experts(), torch.randn(5, 6))] == [["layers.0"], ["layers.1"]]


def test_tensors_of_inference_mode_are_never_shared_since_changes_in_place_do_not_show() -> None:
    module, x = Readers(), torch.randn(5, 6)
    names = ["layers.0", "layers.1", "layers.4"]
    observer = Observer(module, names, current=lambda: 0, mask=lambda *_: None, wanted=lambda _: BOTH)
    with torch.inference_mode():
        module(x.clone())
    readings = observer.take(0)
    assert [reading.layers for reading in readings] == [[name] for name in names]
    for reading, expected in zip(readings, (x, x, x + 1), strict=True):
        assert torch.equal(reading.inputs, expected)  # type: ignore[arg-type]


def test_only_the_wanted_sides_are_copied() -> None:
    module = Readers()
    observer = Observer(
        module,
        ["layers.0", "layers.1"],
        current=lambda: 0,
        mask=lambda *_: None,
        wanted=lambda name: frozenset({"output"}) if name == "layers.1" else frozenset(),
    )
    with torch.no_grad():
        module(torch.randn(5, 6))
    (reading,) = observer.take(0)
    assert reading.inputs is None
    assert list(reading.outputs) == ["layers.1"]


def test_a_unit_that_is_a_layer_with_bias_is_seen_while_its_weight_is_loaded(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)  # type: ignore[no-any-return]

    reference, stream = stream_module(Head, tmp_path)
    observer = Observer(
        stream.model, ["head"], current=lambda: stream.current, mask=lambda *_: None, wanted=lambda _: BOTH
    )
    products: list[torch.Tensor] = []

    def leave(batch: int, unit: object) -> None:
        for reading in observer.take(batch):
            assert reading.inputs is not None
            products.append(reading.inputs @ stream.model.head.weight.T)  # type: ignore[operator, union-attr]

    stream.on_leave = leave
    x = torch.randn(5, 6)
    stream.run([lambda: stream.model(x)])
    (product,) = products
    torch.testing.assert_close(product, x @ reference.head.weight.detach().T)  # type: ignore[operator, union-attr]


def test_rows_hold_no_graph_where_gradients_are_enabled() -> None:
    module, x = Readers(), torch.randn(5, 6)
    names = ["layers.0", "layers.1"]
    observer = Observer(module, names, current=lambda: 0, mask=lambda *_: None, wanted=lambda _: BOTH)
    read = x.clone().requires_grad_()
    y = module.layers[1](module.layers[0](read))  # type: ignore[operator]
    readings = observer.take(0)
    assert torch.equal(readings[0].inputs, x)  # type: ignore[arg-type]
    rows = [tensor for reading in readings for tensor in (reading.inputs, *reading.outputs.values())]
    assert len(rows) == 4
    assert not any(tensor is None or tensor.requires_grad for tensor in rows)
    y.sum().backward()
    assert read.grad is not None, "the model's own gradients pass as before"
