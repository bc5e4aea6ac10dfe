"""The streamed backward of many architectures gives the gradients of autograd, reading every weight at most twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import pico
from tests.streaming.backward_reference import (
    EXACT,
    calls,
    collect,
    count_reads,
    distance,
    family_in_memory,
    loss,
    open_backward,
    reference,
)
from tests.streaming.streamed import checkpoint_bytes

EXACT_FLOAT32 = 3e-6  # the grouped product of fused experts knows no float64
MOE = {"qwen3-moe", "MixtralForCausalLM"}


@pytest.mark.parametrize("family", list(pico.CLASSES))
def test_gradients_equal_autograd_in_memory_and_every_weight_is_read_at_most_twice(family: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path, family)
    dtype, exact = (torch.float32, EXACT_FLOAT32) if family in MOE else (torch.float64, EXACT)
    model = family_in_memory(tmp_path, dtype)
    stream, layers = open_backward(tmp_path, dtype=str(dtype).removeprefix("torch."))
    expected = reference(model, layers, calls(model), loss)
    assert {layer for _, layer in expected.rows} == {layer.name for layer in layers} - unused(family)

    reads = count_reads(stream)
    found = collect(stream, calls(stream.model), loss)
    assert distance(found, expected) < exact
    assert set(reads.values()) <= {1, 2}
    assert stream.weights.tensors.bytes_read <= 2 * checkpoint_bytes(tmp_path)

    # Control: one weight of the first block, changed by a hundredth, shows.
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".0." in name and p.dim() == 2).mul_(1.01)
    assert distance(reference(model, layers, calls(model), loss), expected) > 100 * exact


def unused(family: str) -> set[str]:
    """Linear layers that the loss of a family's model does not depend on."""
    return {"albert": {"albert.pooler"}}.get(family, set())


def other_models() -> dict[str, tuple[Any, list[dict[str, torch.Tensor]]]]:
    """An encoder with a decoder, images, two towers, sound, and experts: configurations, and inputs with a loss."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"image_size": 32, "patch_size": 8}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    whisper = {
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8, "max_source_positions": 30},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    }
    towers = {"text_config": {**small, "vocab_size": 100, "eos_token_id": 2}, "vision_config": {**small, **image}}

    def ids(rows: int, length: int) -> torch.Tensor:
        return torch.randint(5, 90, (rows, length))

    def pixels() -> torch.Tensor:
        return torch.randn(2, 3, 32, 32, dtype=torch.float64)

    return {
        "T5ForConditionalGeneration": (
            transformers.T5Config(vocab_size=100, **t5),
            [{"input_ids": ids(2, length), "labels": ids(2, 7)} for length in (9, 12)],
        ),
        "ViTForImageClassification": (
            transformers.ViTConfig(**small, **image),
            [{"pixel_values": pixels(), "labels": torch.tensor([0, 1])} for _ in range(2)],
        ),
        "CLIPModel": (
            transformers.CLIPConfig(**towers, projection_dim=16),
            [{"input_ids": ids(2, 8), "pixel_values": pixels(), "return_loss": torch.tensor(True)} for _ in range(2)],
        ),
        "WhisperForConditionalGeneration": (
            transformers.WhisperConfig(vocab_size=100, max_target_positions=40, **whisper),
            [{"input_features": torch.randn(1, 8, 60).double(), "labels": ids(1, 7)} for _ in range(2)],
        ),
        "MixtralForCausalLM": (
            transformers.MixtralConfig(**small, vocab_size=100, num_key_value_heads=2, num_local_experts=4),
            [{"input_ids": (text := ids(2, length)), "labels": text} for length in (9, 12)],
        ),
    }


@pytest.mark.parametrize("name", list(other_models()))
def test_gradients_equal_autograd_in_memory_for_other_kinds_of_models(name: str, tmp_path: Path) -> None:
    config, inputs = other_models()[name]
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    dtype, exact = (torch.float32, EXACT_FLOAT32) if name in MOE else (torch.float64, EXACT)
    model = family_in_memory(tmp_path, dtype)
    stream, layers = open_backward(tmp_path, dtype=str(dtype).removeprefix("torch."))
    options = {"use_cache": False} if hasattr(config, "use_cache") else {}
    expected = reference(model, layers, [lambda i=i: model(**i, **options) for i in inputs], loss)  # type: ignore[misc]
    reads = count_reads(stream)
    found = collect(stream, [lambda i=i: stream.model(**i, **options) for i in inputs], loss)  # type: ignore[misc]
    assert len(expected.rows) > 2 * len(inputs)
    assert distance(found, expected) < exact
    assert max(reads.values()) <= 2
