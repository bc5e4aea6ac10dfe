"""Sums of Grams where layers read one tensor in some batches and different ones in others, and with biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from emloc_tools.data.batches import Batch
from emloc_tools.errors import InputError, NumericalError
from emloc_tools.files.calibration import GramSpool
from emloc_tools.records import Layer, Step
from emloc_tools.stages.gram_sums import GramSums
from emloc_tools.streaming.padding import Padding
from emloc_tools.streaming.units import Unit
from tests.stages.reference import close_to


class Fork(nn.Module):
    """Two layers that read the same tensor or two different ones, and a narrow one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8, bias=False), nn.Linear(3, 8, bias=False)
        self.narrow = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> None:
        self.a(x)
        self.b(other)
        self.narrow(torch.sin(x))


LAYERS = [
    Layer("a", 8, 3, "linear", has_bias=False),
    Layer("b", 8, 3, "linear", has_bias=False),
    Layer("narrow", 2, 3, "linear", has_bias=True),
]


@pytest.fixture
def gather(tmp_path: Path) -> Callable[..., GramSums]:
    """Run calls of a `Fork` as if each were a batch that leaves its only unit at the end."""

    def run(model: Fork, calls: list[tuple[torch.Tensor, torch.Tensor]], steps: list[Step] | None = None) -> GramSums:
        stream: Any = SimpleNamespace(model=model, current=0, units=["unit"])
        unit = Unit("unit", model, 0, [])
        padding = Padding(stream, [Batch({}, None, None) for _ in calls])
        progress = [].append if steps is None else steps.append
        statistics = GramSums(stream, LAYERS, padding, GramSpool(tmp_path / "spool"), progress)
        with torch.no_grad():
            for stream.current, (x, other) in enumerate(calls):
                model(x, other)
                stream.on_leave(stream.current, unit)
        stream.on_unit_done(unit)
        statistics.finish()
        return statistics

    return run


def unpacked(statistics: GramSums) -> dict[str, tuple[str, int, torch.Tensor]]:
    """Side, tokens and Gram of each layer."""
    found = {}
    for entry in statistics.entries():
        rows, columns = torch.tril_indices(entry.features, entry.features)
        G = torch.zeros(entry.features, entry.features)
        G[rows, columns] = G[columns, rows] = statistics.packed(entry)
        found |= dict.fromkeys(entry.layers, (entry.side, entry.tokens, G))
    return found


def test_a_layer_s_gram_is_the_sum_over_all_sets_that_it_was_seen_in(gather: Callable[..., GramSums]) -> None:
    x, y, z = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3)
    statistics = gather(Fork(), [(x, x), (y, z)])
    grams = unpacked(statistics)
    assert sorted(entry.layers for entry in statistics.entries()) == [("a",), ("b",), ("narrow",)]
    for name, other in (("a", y), ("b", z)):
        side, tokens, G = grams[name]
        assert (side, tokens) == ("input", 9)
        assert close_to(G, x.T @ x + other.T @ other) < 1e-6


def test_layers_that_always_read_one_tensor_have_one_gram(gather: Callable[..., GramSums]) -> None:
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    statistics = gather(Fork(), [(x, x), (y, y)])
    assert sorted(entry.layers for entry in statistics.entries()) == [("a", "b"), ("narrow",)]
    assert close_to(unpacked(statistics)["b"][2], x.T @ x + y.T @ y) < 1e-6


def test_outputs_count_without_their_bias(gather: Callable[..., GramSums]) -> None:
    model, x = Fork(), torch.randn(50, 3)
    with torch.no_grad():
        model.narrow.bias.fill_(100.0)  # taking it off rounded outputs again would leave few digits
    side, tokens, G = unpacked(gather(model, [(x, x)]))["narrow"]
    Y = torch.sin(x).double() @ model.narrow.weight.detach().double().T
    assert (side, tokens) == ("output", 50)
    assert close_to(G, Y.T @ Y) < 1e-6


def test_a_change_of_the_input_afterwards_does_not_reach_the_gram(gather: Callable[..., GramSums]) -> None:
    class Overwriting(Fork):
        def forward(self, x: torch.Tensor, other: torch.Tensor) -> None:
            super().forward(x, other)
            x.zero_()

    x = torch.randn(5, 3)
    expected = x.T @ x
    assert close_to(unpacked(gather(Overwriting(), [(x, x)]))["a"][2], expected) < 1e-6


def test_data_that_are_not_finite_name_the_layer(gather: Callable[..., GramSums]) -> None:
    x = torch.randn(5, 3)
    with pytest.raises(NumericalError, match="the data of layer b hold NaN or infinity"):
        gather(Fork(), [(x, x * float("inf"))])


def test_data_that_reach_no_layer_are_refused(gather: Callable[..., GramSums]) -> None:
    with pytest.raises(InputError, match="no sample reached any of the chosen layers"):
        gather(Fork(), [])


def test_the_progress_counts_units(gather: Callable[..., GramSums]) -> None:
    steps: list[Step] = []
    gather(Fork(), [(torch.randn(5, 3), torch.randn(5, 3))], steps)
    assert steps == [Step("calibrate", 1, 1, "unit")]
