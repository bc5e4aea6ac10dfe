"""A LoRA on an emulator has the keys of one on the base, and a script that knows nothing of emulators trains it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.external.workshop import Case, factored_layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["list", "all-linear"])
def test_a_lora_on_the_emulator_has_the_tensors_of_one_on_the_base(
    training: dict[str, Any], targets: str, dtype: str
) -> None:
    adapters = training["adapters"][f"{dtype} {targets}"]
    assert adapters["base"]
    assert adapters["emulator"] == adapters["base"]


def test_all_linear_reaches_every_factored_layer(training: dict[str, Any], case: Case) -> None:
    """So the comparison above is about low-rank layers, and PEFT took each of them for one linear layer."""
    keys = training["adapters"]["float32 all-linear"]["emulator"]
    adapted = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key) for key in keys}
    assert set(factored_layers(case.emulator)) <= adapted


def test_the_loss_over_all_samples_falls(training: dict[str, Any]) -> None:
    """Every step sees all samples, so the loss cannot fall by their order."""
    assert training["losses"][-1] < training["losses"][0]


def test_every_layer_of_the_adapter_learned(training: dict[str, Any], case: Case, output: Path) -> None:
    """A LoRA starts with B = 0; gradients have to come through the low-rank layers to change the first one's."""
    adapter = load_file(output / case.name / "adapter" / "adapter_model.safetensors")
    Bs = {key: tensor for key, tensor in adapter.items() if ".lora_B." in key}
    assert len(Bs) == len(training["adapters"]["float32 all-linear"]["emulator"]) / 2
    for key, B in Bs.items():
        assert torch.isfinite(B).all(), key
        assert B.count_nonzero() > 0, key
