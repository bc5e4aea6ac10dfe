"""Factors of fused experts in 4 bits: outputs and gradients are those of the dequantised factors, expert by expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools import load_emulator
from emloc_tools.models.lowrank_experts import LowRankExperts
from emloc_tools.stages.build_emulator import build_emulator
from tests import pico

IDS = torch.arange(5, 21)[None]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small mixture of experts, factors of whose matrices are no whole number of blocks."""
    root = tmp_path_factory.mktemp("experts")
    pico.save_model(root / "base", "qwen3-moe")
    build_emulator(base=str(root / "base"), ratio=0.5, output=root / "emulator")
    return root / "emulator"


def unpacked(weight: Any, shape: torch.Size) -> torch.Tensor:
    """A quantised stack by the definition: every expert's numbers in blocks of 64, each with a scale."""
    state, packed = weight.quant_state, weight.data.flatten().long()
    entries = state.code.double()[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    experts = (entries * state.absmax.double().repeat_interleave(64)).view(shape[0], -1)
    return experts[:, : shape[1] * shape[2]].reshape(shape)


def loaded(emulator: Path, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    return transformers.AutoModelForCausalLM.from_pretrained(
        emulator, trust_remote_code=True, quantization_config=config
    )


def gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and the gradient of a loss at the embeddings, which has gone through every layer."""
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    output = model(inputs_embeds=embeddings, labels=IDS)
    return output.logits.detach(), torch.autograd.grad(output.loss, embeddings)[0]


def test_outputs_and_gradients_are_those_of_the_dequantised_factors(emulator: Path) -> None:
    model, reference = loaded(emulator), load_emulator(emulator)
    stored = gradient(reference)
    quantised = [name for name, weight in model.named_parameters() if hasattr(weight, "quant_state")]
    layers = dict(model.named_modules())
    for name in quantised:
        module, _, factor = name.rpartition(".")
        with torch.no_grad():
            target = reference.get_parameter(name)
            dense = layers[module]._factor(factor) if target.dim() == 2 else None
            target.copy_(unpacked(model.get_parameter(name), target.shape) if dense is None else dense)
    assert sum("experts" in name for name in quantised) == 2 * 2 * 3  # two factors, two projections, three blocks
    for found, expected, other in zip(gradient(model), gradient(reference), stored, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (other - expected).abs().max() > 0.01 * expected.abs().max()


def test_scales_may_be_quantised_too(emulator: Path) -> None:
    once, twice = gradient(loaded(emulator))[0], gradient(loaded(emulator, bnb_4bit_use_double_quant=True))[0]
    assert 0 < (once - twice).abs().max() < 0.1 * once.abs().max()


def test_every_expert_takes_half_a_byte_for_each_number(emulator: Path) -> None:
    stored = dict(load_emulator(emulator).named_parameters())
    model = loaded(emulator)
    experts = {
        path: part for path, part in model.named_modules() if "LowRank" in type(part).__name__ and "experts" in path
    }
    assert len(experts) == 3
    for path, part in experts.items():
        for name in part.factored:
            for factor in ("U", "Vh"):
                count, rows, columns = stored[f"{path}.{name}_{factor}"].shape
                assert getattr(part, f"{name}_{factor}").nbytes == count * -(-rows * columns // 64) * 32
    assert LowRankExperts.four_bits is None
