"""Text encoders, and models with an encoder and a decoder for text or sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.architectures.family import VOCABULARY, Draw, Family, Inputs, configured, padded, texts

TEXT, SOUND = "text", "sound"


def encoder(
    name: str, prefix: str, inputs: Callable[[Draw], list[Inputs]] = texts, notes: str = "", **changes: Any
) -> Family:
    """A family `<prefix>ForMaskedLM` with `<prefix>Config`."""
    return Family(name, f"{prefix}ForMaskedLM", TEXT, configured(f"{prefix}Config", **changes), inputs, notes=notes)


def single_texts(draw: Draw) -> list[Inputs]:
    """Batches of one text each: DeBERTa's layers read its table of positions once per batch."""
    batches = [{"input_ids": ids, "labels": ids.clone()} for ids in (draw.ids(1, 31), draw.ids(1, 19), draw.ids(1, 24))]
    return [*batches[:2], padded(batches[2], 0, slice(-5, None))]


def sequences(draw: Draw) -> list[Inputs]:
    """Texts to read and to write. In the second batch both are padded, to one length."""
    batches = [{"input_ids": draw.ids(3, 13), "labels": draw.ids(3, 7)}]
    batches.append(padded({"input_ids": draw.ids(3, 9)}, 1, slice(-3, None)))
    batches[1]["labels"] = draw.ids(3, 9)
    batches[1]["labels"][2, -4:] = -100
    return batches


def sounds(draw: Draw) -> list[Inputs]:
    """Spectra, and what is said."""
    return [{"input_features": draw.values(2, 8, 60), "labels": draw.ids(2, length)} for length in (7, 11)]


T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
HALVES: dict[str, Any] = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1},
}

WAV2VEC2: dict[str, Any] = {
    **{"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer"},
}


def waves(draw: Draw) -> list[Inputs]:
    """Sounds as they are, and what is said."""
    return [{"input_values": draw.values(2, 400), "labels": draw.ids(2, length)} for length in (5, 7)]


FAMILIES = (
    encoder("BERT", "Bert"),
    encoder("RoBERTa", "Roberta"),
    encoder("DistilBERT", "DistilBert", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    encoder("ALBERT", "Albert", notes="one block, used three times", embedding_size=16, num_hidden_layers=3),
    encoder(
        "DeBERTa-v2",
        "DebertaV2",
        single_texts,
        "layers that read the table of positions",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    encoder("ModernBERT", "ModernBert", global_attn_every_n_layers=2, local_attention=8),
    encoder("ELECTRA", "Electra", embedding_size=16),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        TEXT,
        lambda: transformers.T5Config(**T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
        sequences,
        spread=1.0,  # its attention is not scaled
    ),
    Family(
        "BART",
        "BartForConditionalGeneration",
        TEXT,
        configured("BartConfig", **HALVES),
        sequences,
        torch.bfloat16,
        notes="CausalLM is the decoder alone",
    ),
    Family(
        "Whisper",
        "WhisperForConditionalGeneration",
        SOUND,
        configured("WhisperConfig", **HALVES, num_mel_bins=8, max_source_positions=30, max_target_positions=40),
        sounds,
        sharded=True,
        notes="CausalLM is the decoder alone",
    ),
    Family(
        "wav2vec 2.0",
        "Wav2Vec2ForCTC",
        SOUND,
        configured("Wav2Vec2Config", **WAV2VEC2),
        waves,
        notes="convolutions stay dense",
    ),
)
