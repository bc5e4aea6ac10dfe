"""axolotl: `axolotl train FILE`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emloc_tools.trainers.settings import DataKind, Settings, heading, yaml

TYPES: dict[DataKind, dict[str, Any]] = {
    "text": {"type": "completion", "field": "text"},
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "prompt": {
        "type": {
            "field_instruction": "prompt",
            "field_output": "completion",
            "format": "{instruction}",
            "no_input_format": "{instruction}",
        }
    },
}


def files(settings: Settings, name: str) -> Mapping[str, str]:
    """The configuration."""
    template = {"chat_template": "tokenizer_default"} if settings.kind == "messages" else {}
    lines = {
        **heading(settings, f"axolotl train {name}"),
        "base_model": settings.emulator,
        "#trust": "The emulator's class is a file in its folder; without this it does not load.",
        "trust_remote_code": True,
        "#quantisation": _says_of_bits(settings),
        "load_in_8bit": False,
        "load_in_4bit": settings.four_bits,
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        "tf32": False,
        **template,
        "datasets": [{"path": settings.data, "ds_type": "json", **TYPES[settings.kind]}],
        "val_set_size": 0,
        "sequence_len": settings.max_length,
        "#lora": "Plain LoRA on the layers that are factors. The fused LoRA kernels read dense weights: they stay off.",
        "adapter": "qlora" if settings.four_bits else "lora",
        "lora_r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(settings.targets),
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "micro_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "optimizer": "adamw_torch",
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "cosine",
        **({"num_epochs": settings.epochs} if settings.steps is None else {"max_steps": settings.steps}),
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": settings.adapter,
    }
    return {name: yaml(lines)}


def _says_of_bits(settings: Settings) -> str:
    if settings.four_bits:
        return "The emulator's layers are held in 4 bits, by bitsandbytes."
    return "The emulator is small already, and is no quantised model."
