"""The lock-step forward of modules that do not keep to the usual order of blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from emloc_tools.errors import NumericalError
from emloc_tools.streaming.stream import LockStep
from emloc_tools.streaming.units import Unit
from tests.streaming.streamed import checkpoint, checkpoint_bytes, in_memory, open_stream, stream_module


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


def test_a_model_that_divides_its_weights_for_inference_is_streamed_as_it_was_trained(tmp_path: Path) -> None:
    """RWKV halves activations then: here after every block, by default after six. The rest is the same."""
    sizes = {"vocab_size": 48, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 4}
    config = transformers.RwkvConfig(**sizes, intermediate_size=24, context_length=32, rescale_every=1)
    torch.manual_seed(0)
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.randint(48, (2, 9))
    model, weight = in_memory(tmp_path), "rwkv.blocks.3.attention.output.weight"
    with torch.no_grad():
        expected = model.train()(input_ids=ids).logits  # it has no dropout
        model.eval()(input_ids=ids)
    assert torch.equal(model.get_parameter(weight) * 2**3, checkpoint(tmp_path)[weight])  # it did divide
    stream, results = open_stream(tmp_path), {}
    stream.run([lambda: stream.model(input_ids=ids).logits], results.__setitem__)
    torch.testing.assert_close(results[0], expected)
    stream.model.config.rescale_every = 1  # control: activations halved beside the weights of the checkpoint
    stream.run([lambda: stream.model(input_ids=ids).logits], results.__setitem__)
    assert (results[0] - expected).abs().max() > 0.1 * expected.abs().max()
