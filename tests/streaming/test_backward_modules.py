"""The streamed backward of modules that do not keep to the usual order of blocks, or change tensors in place."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from emloc_tools.streaming.spill import Spill
from tests.streaming.backward_reference import (
    EXACT,
    collect,
    count_reads,
    distance,
    reference,
    stream_module_backward,
)
from tests.streaming.small_modules import TOKENS, WIDTH, Plain, batches, loss


class Pair(NamedTuple):
    x: torch.Tensor
    scale: torch.Tensor


@dataclasses.dataclass
class Output(ModelOutput):  # type: ignore[misc]
    hidden: torch.Tensor | None = None
    unused: torch.Tensor | None = None


class ChangesInput(Plain):
    """Changes its input in place and returns something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        x.mul_(0.5)
        return torch.tanh(y)


class ReturnsChangedInput(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += torch.tanh(super().forward(x.clone()))
        return x


class FillsBuffer(Plain):
    """Writes its result into an argument that needed no gradient until then."""

    def forward(self, x: torch.Tensor, buffer: torch.Tensor) -> None:
        buffer.add_(super().forward(x))


class Structured(Plain):
    """Takes a named tuple and opaque arguments; returns an output class, integers, None, the same tensor twice."""

    def forward(self, pair: Pair, *, flag: str, options: dict[str, Any]) -> Any:
        assert (flag, options["numbers"]) == ("on", [1, 2])
        hidden = super().forward(pair.x) * pair.scale
        return Output(hidden=hidden, unused=self.up(pair.x)), hidden.argmax(-1), None, (hidden, pair.scale)


class SameTwice(Plain):
    """Asks whether two arguments are one tensor, as torch's attention does."""

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return super().forward(query) if query is key else super().forward(query + key)


class Transposed(Plain):
    """Relies on the order in memory of its input: `view` works on the transpose of a transposed tensor only."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return super().forward(x.view(-1, WIDTH)).view(x.shape) * mask


class CallsAnother(Plain):
    """Uses a module of another unit in its middle."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]  # hidden from the tree of modules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.other[0](self.up(x)[..., :WIDTH]).repeat(1, 1, 2)[..., :12])  # type: ignore[no-any-return]


class NeverCalled(Plain):
    """Its layers are called by the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        shared = Plain()
        units = [ChangesInput(), ReturnsChangedInput(), FillsBuffer(), Structured(), SameTwice(), Transposed()]
        self.blocks = nn.ModuleList([shared, *units, NeverCalled(), CallsAnother(shared)])
        self.frozen = nn.ModuleList([Plain()])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, detour: bool) -> torch.Tensor:
        shared, changes, returns, fills, structured, same, transposed, children, calls = self.blocks
        x = shared(self.embed(ids) * self.scale)
        for _ in range(3):  # a unit that is used several times
            x = x + shared(x)
        y = x * 2
        x = changes(y) + y  # y is another one after the call
        w = x * 1.5
        r = returns(w)
        assert r is w
        x = r + w.exp() * 0.1
        buffer = torch.zeros_like(x)
        fills(x, buffer)
        x = x + torch.tanh(buffer)
        with torch.no_grad():
            fixed = self.frozen[0](x)
        output, best, nothing, (again, scale) = structured(
            Pair(x, fixed.abs() + 0.5), flag="on", options={"numbers": [1, 2]}
        )
        assert nothing is None
        assert best.dtype == torch.long
        x = output.hidden + 0.1 * again * scale
        x[:, :2] += 1.0  # in place on what came out of a unit
        x = torch.softmax(x, -1) * x  # nodes between units that save tensors
        x = same(x, x) + same(x, fixed)
        x = transposed(x.transpose(1, 2), torch.ones(1, 1, 1).expand(x.shape))
        if detour:
            x = children.down(torch.tanh(children.up(x)))
        x = calls(x)
        x.mul_(1.1)
        return self.head(x)  # type: ignore[no-any-return]


def forwards(model: nn.Module) -> list[Callable[[], torch.Tensor]]:
    return [lambda ids=ids, i=i: model(ids, detour=i % 2 == 1) for i, ids in enumerate(batches())]  # type: ignore[misc]


def test_gradients_of_an_odd_network_equal_autograd_in_memory(tmp_path: Path) -> None:
    model, stream, layers = stream_module_backward(Odd, tmp_path)
    assert len([unit for unit in stream.units if unit.name.startswith("blocks.")]) == 9
    expected = reference(model, layers, forwards(model), loss)
    reached = {name for _, name in expected.rows}
    assert {layer.name for layer in layers} - reached == {"frozen.0.up", "frozen.0.down"}
    assert len(expected.rows[0, "blocks.0.up"]) == 5  # four times by the model, once by another block

    found = collect(stream, forwards(stream.model), loss)
    assert distance(found, expected) < EXACT
    stream.close()
    assert not any("forward" in module.__dict__ for module in stream.model.modules())

    # Control: leaving out one of the five calls shows, and so does another loss.
    missing = {key: rows[1:] if key == (0, "blocks.0.up") else rows for key, rows in expected.rows.items()}
    assert distance(found, dataclasses.replace(expected, rows=missing)) == float("inf")
    assert distance(found, reference(model, layers, forwards(model), lambda i, y: 1.01 * loss(i, y))) > 1e-3


def test_in_place_changes_really_matter_in_the_odd_network(tmp_path: Path) -> None:
    """The control for the in-place cases: without the change of the input the gradients are others."""

    class Tame(Odd):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1].__class__ = Plain

    torch.manual_seed(3)
    odd, _, layers = stream_module_backward(Odd, tmp_path)
    tame = Tame().double()
    tame.load_state_dict(odd.state_dict())
    expected = reference(odd, layers, forwards(odd), loss)
    assert distance(reference(tame, layers, forwards(tame), loss), expected) > 1e-3


class Tied(nn.Module):
    """Blocks that share one weight, and a head that shares another one with the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Plain() for _ in range(3)])
        for block in list(self.blocks)[1:]:
            block.up.weight = self.blocks[0].up.weight  # type: ignore[union-attr]
        self.head = nn.Linear(WIDTH, TOKENS)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, detour: bool) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_units_that_share_weights_read_them_at_most_twice(tmp_path: Path) -> None:
    model, stream, layers = stream_module_backward(Tied, tmp_path)
    reads = count_reads(stream)
    found = collect(stream, forwards(stream.model), loss)
    assert distance(found, reference(model, layers, forwards(model), loss)) < EXACT
    assert reads["blocks.0.up.weight"] == 1  # kept from the forward, since the backward needs it too
    assert reads["embed.weight"] == 1
    assert reads["blocks.2.down.weight"] == 2


class Deep(nn.Module):
    """Blocks with work between them that saves tensors."""

    depth = 4

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Plain() for _ in range(self.depth)])
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: torch.Tensor, detour: bool) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.tanh(x + block(x)) * x.sigmoid()
        return self.head(x)  # type: ignore[no-any-return]


class Deeper(Deep):
    depth = 16


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_does_not_grow_with_depth(direction: str, tmp_path: Path) -> None:
    """Bytes of all tensors that Python or the graph's nodes hold, when a unit is done."""
    gc.freeze()  # what is there already need not be looked at
    peaks = []
    for make in (Deep, Deeper):
        folder = tmp_path / make.__name__
        folder.mkdir()
        _, stream, _ = stream_module_backward(make, folder)
        seen: list[int] = []
        callback = "on_unit_done" if direction == "forward" else "on_backward_unit_done"
        setattr(stream, callback, lambda unit, seen=seen: seen.append(live_bytes()))
        stream.run_backward(forwards(stream.model), loss)
        peaks.append(max(seen))
        hidden = sum(ids.numel() for ids in batches()) * WIDTH * 8
        assert stream.spilled > make.depth * hidden  # so this is what memory would have held
        del stream
    gc.unfreeze()
    assert peaks[1] < 1.05 * peaks[0]


def test_work_between_units_is_differentiated_once_whatever_the_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residual connections between units would carry every gradient through all blocks below, were they not cut."""
    loads: list[int] = []
    load = Spill.load

    def counting(spill: Spill, stored: Any) -> torch.Tensor:
        loads[-1] += 1
        return load(spill, stored)

    monkeypatch.setattr(Spill, "load", counting)
    for make in (Deep, Deeper):
        folder = tmp_path / make.__name__
        folder.mkdir()
        _, stream, _ = stream_module_backward(make, folder)
        loads.append(0)
        stream.run_backward(forwards(stream.model), loss)
    assert 0 < loads[1] < 1.1 * loads[0] * Deeper.depth / Deep.depth


def live_bytes() -> int:
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter) and not thing.is_meta)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
