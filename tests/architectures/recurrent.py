"""Language models with state-space or convolutional layers."""

from __future__ import annotations

from tests.architectures.experts import NAMES_OF_EXPERTS
from tests.architectures.family import Family, configured, texts

MAMBA = "convolution and state space stay dense; PEFT takes no LoRA on out_proj"

FAMILIES = (
    Family(
        "Mamba",
        "MambaForCausalLM",
        "text",
        configured("MambaConfig", state_size=8),
        texts,
        no_lora=("out_proj",),
        notes=MAMBA,
    ),
    Family(
        "Mamba2",
        "Mamba2ForCausalLM",
        "text",
        configured("Mamba2Config", chunk_size=8, state_size=8, num_heads=8, head_dim=8, n_groups=2, expand=2),
        texts,
        no_lora=("out_proj",),
        notes=MAMBA,
    ),
    Family(
        "RWKV",
        "RwkvForCausalLM",
        "text",
        configured("RwkvConfig", attention_hidden_size=32, context_length=64, use_cache=False),
        texts,
        notes="the base halves activations every six blocks, its emulator does not",
    ),
    Family(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        "text",
        configured(
            "Qwen3NextConfig",
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        texts,
        no_lora=NAMES_OF_EXPERTS,
    ),
    Family(
        "Zamba2",
        "Zamba2ForCausalLM",
        "text",
        configured(
            "Zamba2Config",
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            mamba_d_state=8,
            mamba_headdim=8,
            chunk_size=8,
            n_mamba_heads=8,
            num_mem_blocks=1,
            adapter_rank=8,
            attention_head_dim=16,
            attention_hidden_size=64,
            num_key_value_heads=4,
            mamba_ngroups=1,
        ),
        texts,
        no_lora=("out_proj",),
        notes=MAMBA,
    ),
    Family(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        "text",
        configured(
            "FalconH1Config",
            num_key_value_heads=2,
            head_dim=8,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_d_ssm=64,
            mamba_chunk_size=8,
            ssm_multipliers=[0.5, 0.7, 0.9, 1.1, 1.3],
        ),
        texts,
        no_lora=("out_proj",),
        notes=MAMBA,
    ),
)
