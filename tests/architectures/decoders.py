"""Language models that predict the next token."""

from __future__ import annotations

from typing import Any

import torch

from tests.architectures.family import Family, configured, texts

TEXT = "text"


def decoder(
    name: str,
    prefix: str,
    *,
    model: str = "",
    config: str = "",
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    notes: str = "",
    **changes: Any,
) -> Family:
    """A family with the class `<prefix>ForCausalLM` and `<prefix>Config`, unless others are named."""
    make = configured(config or f"{prefix}Config", **changes)
    return Family(name, model or f"{prefix}ForCausalLM", TEXT, make, texts, dtype, sharded, notes=notes)


GROUPED = {"num_key_value_heads": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}

FAMILIES = (
    decoder("Llama", "Llama", **GROUPED, sharded=True),
    decoder("Qwen2", "Qwen2", **GROUPED, dtype=torch.bfloat16),
    decoder("Qwen3", "Qwen3", **GROUPED, head_dim=8, tie_word_embeddings=True, notes="head tied to the embedding"),
    decoder("Gemma2", "Gemma2", **GROUPED, head_dim=8, **SLIDING),
    decoder("Gemma3", "Gemma3", config="Gemma3TextConfig", **GROUPED, head_dim=8, **SLIDING),
    decoder("Mistral", "Mistral", **GROUPED, sliding_window=6, dtype=torch.bfloat16, sharded=True),
    decoder("Phi3", "Phi3", **GROUPED, notes="q, k and v are one layer, gate and up another"),
    decoder("Phi", "Phi", notes="attention beside the MLP"),
    decoder("GPT-2", "GPT2", model="GPT2LMHeadModel", notes="Conv1D; q, k and v are one layer"),
    decoder("GPT-NeoX", "GPTNeoX", notes="Pythia; q, k and v are one layer, attention beside the MLP"),
    decoder("GPT-J", "GPTJ", rotary_dim=4, notes="attention beside the MLP"),
    decoder("Falcon", "Falcon", notes="a kind of Linear of its own; attention beside the MLP"),
    decoder("OPT", "OPT", ffn_dim=48, word_embed_proj_dim=24, notes="projections around the blocks stay dense"),
    decoder("BLOOM", "Bloom"),
    decoder("StarCoder2", "Starcoder2", **GROUPED),
    decoder("Cohere", "Cohere", **GROUPED, notes="attention beside the MLP"),
    decoder("GLM-4", "Glm4", **GROUPED, head_dim=8, notes="gate and up are one layer"),
    decoder("SmolLM3", "SmolLM3", **GROUPED),
    decoder("Granite", "Granite", **GROUPED),
    decoder("OLMo 2", "Olmo2", **GROUPED),
)
