"""The ledger of live memory: what counts, since when, and until when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emloc_tools.errors import UnsupportedError
from emloc_tools.planning.ledger import LARGEST_REAL, Ledger, Memory


def on_meta(*shape: int) -> nn.Linear:
    return nn.Linear(*shape, bias=False, device="meta")


def test_storages_count_from_their_making_to_their_end() -> None:
    with Ledger() as ledger:
        first = torch.zeros(100)
        second = first.view(10, 10)[2:]  # looks into the same storage
        assert ledger.now == Memory(0, 0, 400, 0)
        del first
        assert ledger.now.total == 400
        third = torch.zeros(50, dtype=torch.float64)
        assert ledger.now.total == 800
        del second, third
        assert ledger.now.total == 0
    assert ledger.peak == Memory(0, 0, 800, 0)


def test_the_peak_is_that_since_the_start() -> None:
    with Ledger() as ledger:
        torch.zeros(100)
        kept = torch.zeros(10)
        ledger.start()
        assert ledger.peak.total == kept.nbytes
        torch.zeros(20)
    assert ledger.peak.total == 120


def test_a_model_of_fake_weights_computes_with_real_numbers_and_takes_no_memory() -> None:
    model = nn.Sequential(on_meta(1 << 20, 1 << 20), on_meta(1 << 20, 7))
    ledger = Ledger(vocabulary=7)
    ledger.fake_parameters(model.requires_grad_(False))
    assert ledger.now == Memory(4 * ((1 << 40) + 7 * (1 << 20)), 0, 0, 0)  # 4 TiB
    with ledger:
        logits = model(torch.ones(3, 1 << 20))
        assert logits.shape == (3, 7)
        assert ledger.now.logits == 3 * 7 * 4
        assert ledger.now.activations == 0  # the hidden one is gone
    assert ledger.peak.activations == 2 * 3 * 4 * (1 << 20)  # the input and the hidden one


def test_tied_parameters_stay_one_and_count_once() -> None:
    first, second = on_meta(8, 8), on_meta(8, 8)
    second.weight = first.weight
    ledger = Ledger()
    ledger.fake_parameters(nn.ModuleList([first, second]))
    assert first.weight is second.weight
    assert ledger.now.total == 8 * 8 * 4


def test_what_is_held_again_counts_otherwise() -> None:
    with Ledger() as ledger:
        tensor = torch.zeros(25)
        ledger.hold([tensor], "training_state")
        assert ledger.now == Memory(0, 100, 0, 0)
        with ledger.counting_as("weights"):
            other = torch.zeros(5)
        assert ledger.now == Memory(20, 100, 0, 0)
        del tensor, other
    assert ledger.now.total == 0


def test_large_masks_are_not_computed() -> None:
    length = int(LARGEST_REAL**0.5) + 1
    with Ledger() as ledger:
        positions = torch.arange(length)
        mask = positions[None] <= positions[:, None]
        assert type(mask).__name__ == "FakeTensor"
        assert ledger.now.total == length * 8 + length**2
        small = positions[None, :9] <= positions[:9, None]
    assert small.sum() == 45  # the control: this one is real


def test_experts_are_foreseen_as_evenly_used() -> None:
    router, x = on_meta(16, 4), torch.ones(10, 16)
    ledger = Ledger()
    ledger.fake_parameters(router)
    with ledger:
        chosen = router(x).topk(2).indices
        assert torch.bincount(chosen.reshape(-1), minlength=4).tolist() == [5, 5, 5, 5]


def test_a_model_that_decides_by_its_own_results_is_refused() -> None:
    layer = on_meta(4, 4)
    ledger = Ledger()
    ledger.fake_parameters(layer)
    with ledger:
        y = layer(torch.ones(1, 4))
        with pytest.raises(UnsupportedError, match="cannot be foreseen"):
            float(y.detach().sum())
