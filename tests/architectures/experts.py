"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

from tests.architectures.family import Family, configured, texts

TEXT = "text"
GROUPED = {"num_key_value_heads": 2}
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}


# PEFT takes these names for the experts' in some models, wherever they stand.
NAMES_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def mixture(
    name: str, prefix: str, *, config: str = "", no_lora: tuple[str, ...] = (), notes: str = "", **changes: Any
) -> Family:
    """A family `<prefix>ForCausalLM` with `<prefix>Config`."""
    make = configured(config or f"{prefix}Config", **changes)
    return Family(name, f"{prefix}ForCausalLM", TEXT, make, texts, no_lora=no_lora, notes=notes)


FAMILIES = (
    mixture("Mixtral", "Mixtral", **GROUPED, num_local_experts=4),
    mixture("Qwen3-MoE", "Qwen3Moe", **GROUPED, **ROUTED, head_dim=8, decoder_sparse_step=1),
    mixture("OLMoE", "Olmoe", **GROUPED, num_experts=4, num_experts_per_tok=2),
    mixture("GPT-OSS", "GptOss", **GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=6),
    mixture("DeepSeek-V3", "DeepseekV3", **LATENT, no_lora=NAMES_OF_EXPERTS, notes="latent attention"),
    mixture(
        "DeepSeek-V2",
        "DeepseekV2",
        **{**LATENT, "topk_method": "greedy"},
        no_lora=NAMES_OF_EXPERTS,
        notes="latent attention",
    ),
    mixture(
        "Llama4",
        "Llama4",
        config="Llama4TextConfig",
        notes="experts are in a layout of their own and stay dense",
        **{**GROUPED, **{"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48}},
    ),
    mixture("Granite MoE", "GraniteMoe", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
)
