"""The streamed backward refuses what it would compute wrongly, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.streaming.backward import BackwardLockStep
from tests import pico
from tests.streaming.backward_reference import calls, loss, open_backward
from tests.streaming.small_modules import WIDTH, Chain, Plain, require_right_gradients, run_chain
from tests.streaming.streamed import batches


def test_a_key_value_cache_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream, _ = open_backward(tmp_path)
    ids = batches()[0]["input_ids"]
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0 .*use_cache=False"):
        stream.run_backward([lambda: stream.model(input_ids=ids, labels=ids, use_cache=True)], loss)
    assert all(p.is_meta for p in stream.model.parameters())


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream, layers = open_backward(tmp_path)
    stream.close()
    stream.model.get_submodule("model.layers.0.mlp").train()
    with pytest.raises(ValueError, match="training mode"):
        BackwardLockStep(stream.model, stream.weights, layers, spill=tmp_path)


def test_a_loss_that_depends_on_no_chosen_layer_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream, _ = open_backward(tmp_path)
    with pytest.raises(InputError, match="no loss depends on any of the chosen layers"):
        stream.run_backward(calls(stream.model), lambda batch, output: output.logits.detach().sum())


class Noisy(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1e-3 * torch.rand_like(x)


class Counting(Plain):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 1e-4 * self.calls)


class OneRow(Plain):
    """Only a single row of a large result depends on how often the module was called."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = super().forward(x)
        y[0, 0] += 0.1 * self.calls
        return y


class Remembering(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.last is not None and self.last.shape == y.shape:
            y = y + 0.1 * self.last
        self.last = y.detach()
        return y


@pytest.mark.parametrize("kind", [Noisy, Counting, OneRow, Remembering])
def test_a_unit_that_gives_another_result_the_second_time_is_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    class Model(Chain):
        middle = kind

    with pytest.raises(UnsupportedError, match=r"blocks\.1 gave another result when it was run a second time"):
        run_chain(Model, tmp_path)


class Collecting(Plain):
    def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        y = super().forward(x)
        seen.append(y)
        return y


class Stateful(Plain):
    def forward(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        state.steps += 1
        state.values["last"] = x.detach().clone()
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "argument"), [(Collecting, list), (Stateful, lambda: SimpleNamespace(steps=0, values={}))]
)
def test_a_unit_that_changes_the_state_of_an_argument_is_refused(
    kind: type[nn.Module], argument: Callable[[], Any], tmp_path: Path
) -> None:
    class Model(Chain):
        middle = kind

        def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return middle(x, argument())  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedError, match=r"blocks\.1 changes the state of one of its arguments"):
        run_chain(Model, tmp_path)


class Boxed(Plain):
    def forward(self, box: Any) -> torch.Tensor:
        return super().forward(box.x)


def test_gradients_in_an_argument_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    class Model(Chain):
        middle = Boxed

        def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return middle(SimpleNamespace(x=x))  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedError, match=r"blocks\.1 gets an argument of an unknown kind"):
        run_chain(Model, tmp_path)


class Halves(Plain):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = super().forward(x)
        return y, y[..., : WIDTH // 2]


def test_changing_one_of_two_results_that_share_memory_is_refused(tmp_path: Path) -> None:
    class Model(Chain):
        middle = Halves

        def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
            whole, half = middle(x)
            half.mul_(2)
            return whole  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedError, match=r"shares its memory with another input or output of blocks\.1"):
        run_chain(Model, tmp_path)


def test_two_results_that_share_memory_are_followed_as_long_as_they_are_not_changed(tmp_path: Path) -> None:
    class Model(Chain):
        middle = Halves

        def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
            whole, half = middle(x)
            return whole + (half * 2).repeat(1, 1, 2)  # type: ignore[no-any-return]

    require_right_gradients(Model, tmp_path)


class ReturnsView(Plain):
    """Changes its input and returns it as another tensor, whose version starts anew."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += torch.tanh(super().forward(x.clone()))
        return x.view(x.shape)


def test_a_changed_input_that_is_returned_as_a_view_is_not_taken_for_what_it_was(tmp_path: Path) -> None:
    class Model(Chain):
        middle = ReturnsView

        def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
            r = middle(x * 1.5)
            return r.sigmoid() * r

    require_right_gradients(Model, tmp_path)


def test_changing_what_a_gradient_between_units_needs_is_refused(tmp_path: Path) -> None:
    class Model(Chain):
        def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
            y = x.exp()
            z = middle(y * 2)
            y.mul_(3)  # autograd needs y for the gradient of exp
            return z + y  # type: ignore[no-any-return]

    class Late(Chain):
        def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
            y = x.exp()
            y.mul_(3)
            return middle(y)  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedError, match=r"changes in place a tensor of shape .* that its own gradient needs"):
        run_chain(Late, tmp_path)
    # Once its copy is on disk, the change does no harm, though autograd in memory would refuse it.
    run_chain(Model, tmp_path)


def test_the_plain_chain_is_not_refused(tmp_path: Path) -> None:
    """The control of the refusals above: with an ordinary block in the middle the gradients are right."""
    require_right_gradients(Chain, tmp_path)
