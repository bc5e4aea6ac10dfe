"""Language models with state-space or convolutional layers."""

from __future__ import annotations

from tests.architectures.family import Family, configured, texts

FAMILIES = (
    Family("Mamba", "MambaForCausalLM", "text", configured("MambaConfig", state_size=8), texts, no_lora=("out_proj",)),
    Family(
        "Mamba2",
        "Mamba2ForCausalLM",
        "text",
        configured("Mamba2Config", state_size=8, num_heads=8, head_dim=8, n_groups=2, expand=2),
        texts,
        no_lora=("out_proj",),
    ),
)
