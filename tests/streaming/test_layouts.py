"""Padding is left out of the statistics of models that put the length first, or add padding of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from emloc_tools.stages.calibrate import calibrate
from emloc_tools.streaming.layouts import Layouts
from tests.architectures.moments import stored_grams

SMALL: dict[str, Any] = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HALVES: dict[str, Any] = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2},
}
WIDE = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}


def xlnet() -> Any:
    config = transformers.XLNetConfig(**SMALL, d_model=16, n_layer=2, n_head=2, d_inner=24)
    return transformers.XLNetLMHeadModel(config)


def longformer() -> Any:
    config = transformers.LongformerConfig(**BERT, attention_window=4, max_position_embeddings=64)
    return transformers.LongformerForMaskedLM(config)


def led() -> Any:
    positions = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    config = transformers.LEDConfig(**SMALL, **HALVES, **positions, attention_window=4)
    return transformers.LEDForConditionalGeneration(config)


def fsmt() -> Any:
    sizes = {**SMALL, **HALVES, "src_vocab_size": 48, "tgt_vocab_size": 48, "langs": ["en", "de"]}
    return transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**sizes))


def big_bird() -> Any:
    return transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(**BERT, **WIDE))


MODELS: dict[str, tuple[Callable[[], Any], str, tuple[int, ...]]] = {
    # The layers that are looked at, and the texts' lengths; a batch of three tokens has as many texts.
    "xlnet": (xlnet, "ff.layer_1", (7, 3, 5)),
    "longformer": (longformer, "attention.self.key", (7, 3, 6)),
    "led": (led, "longformer_self_attn.query", (7, 3, 6)),
    "fsmt": (fsmt, "encoder.layers.0.fc1", (7, 3, 5)),
    "big_bird": (big_bird, "layer.0.attention.self.key", (30, 26)),  # what blocks attend to varies with the length
}


def samples(lengths: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """Batches of three texts, of which the second is shorter than the others."""
    found = []
    for length in lengths:
        mask = torch.ones(3, length, dtype=torch.int64)
        mask[1, length - 2 :] = 0
        ids = torch.randint(4, 48, (3, length)).masked_fill(mask == 0, 0)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def grams_in_memory(model: Any, names: list[str], batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """XᵀX and its rows of every layer over real tokens, from a model that reads each text alone and without padding."""
    grams: dict[str, torch.Tensor] = {}
    real = 0

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])[:real].double()  # one text: what was filled up comes last
            grams[name] = grams.get(name, 0) + x.T @ x

        return see

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            real = int(mask.sum())
            with torch.no_grad():
                model(input_ids=ids[None, :real], attention_mask=mask[None, :real])
    return grams


@pytest.mark.parametrize("kind", list(MODELS))
def test_statistics_are_those_of_each_text_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, end, lengths = MODELS[kind]
    model = make().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data *= 5
    model.save_pretrained(tmp_path / "base")
    batches = samples(lengths)
    tensors = {f"{n}/{name}": value for n, batch in enumerate(batches) for name, value in batch.items()}
    save_file(tensors, tmp_path / "inputs.safetensors")
    found = grams(tmp_path, "calibration", end)
    expected = grams_in_memory(model, list(found), batches)
    for name, G in found.items():
        assert float((G - expected[name]).norm() / expected[name].norm()) < 1e-6, name
    monkeypatch.setattr(Layouts, "of", lambda self, batch, layer, mask, x: mask)
    for name, G in grams(tmp_path, "control", end).items():  # the same masks, whatever a layer reads
        assert float((G - expected[name]).norm() / expected[name].norm()) > 1e-3, name


def grams(root: Path, output: str, end: str) -> dict[str, torch.Tensor]:
    """The Grams of the layers whose name ends so, in float64."""
    calibrate(
        base=str(root / "base"),
        data=root / "inputs.safetensors",
        output=root / output,
        targets=rf"{end.replace('.', '[.]')}$",
        device="cpu",
    )
    found, sides = stored_grams(root / output)
    assert set(sides.values()) == {"input"}
    return found
