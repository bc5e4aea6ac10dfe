"""The streamed backward refuses what it would compute wrongly, and leaves the model as before when anything fails."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.backward import BackwardLockStep
from tests import pico
from tests.models.backward_reference import collect, distance, open_backward, reference, stream_module_backward
from tests.models.streamed import batches as token_batches
from tests.models.test_backward import EXACT, calls, loss
from tests.models.test_backward_modules import TOKENS, WIDTH, Plain
from tests.models.test_backward_modules import batches as odd_batches
from tests.models.test_backward_modules import loss as odd_loss


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


def test_a_key_value_cache_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    stream, _ = open_backward(tmp_path)
    ids = token_batches()[0]["input_ids"]
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


class Chain(nn.Module):
    """Embeddings, three blocks of which the middle one is of the given kind, and a head."""

    middle: type[nn.Module] = Plain

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Plain(), self.middle(), Plain()])
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first, middle, last = self.blocks
        return self.head(last(self.between(middle, first(self.embed(ids)))))  # type: ignore[no-any-return]

    def between(self, middle: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return middle(x)  # type: ignore[no-any-return]


def run_chain(make: type[Chain], folder: Path) -> BackwardLockStep:
    _, stream, _ = stream_module_backward(make, folder)
    stream.run_backward([lambda ids=ids: stream.model(ids) for ids in odd_batches()], odd_loss)  # type: ignore[misc]
    return stream


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


def require_right_gradients(make: type[Chain], folder: Path) -> None:
    model, stream, layers = stream_module_backward(make, folder)
    made = odd_batches()
    expected = reference(model, layers, [lambda ids=ids: model(ids) for ids in made], odd_loss)  # type: ignore[misc]
    found = collect(stream, [lambda ids=ids: stream.model(ids) for ids in made], odd_loss)  # type: ignore[misc]
    assert distance(found, expected) < EXACT
