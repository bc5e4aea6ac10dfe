"""An emulator folder loads by the Auto classes with its own code, computes what it should, and by no other way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import pico
from tests.external.workshop import Case, factored_layers

KINDS = ("emulator", "sharded")
TOLERANCE = 20 * torch.finfo(torch.float32).eps  # of the largest logit: float32 there, float64 in the reference


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_finds_its_place(training: dict[str, Any], case: Case, kind: str) -> None:
    assert training["loading"][kind] == {
        "class": f"Emloc{pico.CLASSES[case.name]}",
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "error_msgs": [],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_base_does_with_each_weight_replaced_by_its_factors_product(
    training: dict[str, Any], case: Case, output: Path, kind: str
) -> None:
    found = load_file(output / f"{case.name}.safetensors")[kind].double()
    expected, base = (case.reference_logits(dense_emulator=dense) for dense in (True, False))
    limit = TOLERANCE * expected.abs().max()
    assert (found - expected).abs().max() < limit
    assert (found - base).abs().max() > 1000 * limit, "the emulator is the base, so the comparison shows nothing"


@pytest.mark.parametrize("way", ["auto", "stock"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_its_code_it_does_not_load(training: dict[str, Any], kind: str, way: str) -> None:
    error = training["refusals"][kind][way]
    assert error is not None
    assert "mismatch" in error


def test_only_the_guard_prevents_that(training: dict[str, Any], case: Case) -> None:
    """Without that one tensor, a stock class loads the folder and leaves the factored layers random."""
    assert factored_layers(case.unguarded)
    assert training["refusals"]["unguarded"] is None


def test_the_sharded_emulator_is_in_shards(case: Case) -> None:
    """Otherwise the tests above would see the same thing twice."""
    assert len(list(case.sharded.glob("model-*.safetensors"))) > 2
    assert not list(case.emulator.glob("model-*.safetensors"))
