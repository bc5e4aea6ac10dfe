"""TRL: `trl sft --config FILE`."""

from __future__ import annotations

from collections.abc import Mapping

from emloc_tools.trainers.settings import Settings, heading, yaml

FOUR_BITS = {
    "#four bits": "The emulator's layers are held in 4 bits, by bitsandbytes.",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
}


def files(settings: Settings, name: str) -> Mapping[str, str]:
    """The configuration. TRL knows all three kinds of data by their columns."""
    lines = {
        **heading(settings, f"trl sft --config {name}"),
        "model_name_or_path": settings.emulator,
        "#trust": "The emulator's class is a file in its folder; without this it does not load.",
        "trust_remote_code": True,
        "#dtype": "TRL takes float32 unless told; this is what the emulator is stored in.",
        "dtype": settings.dtype,
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        **(FOUR_BITS if settings.four_bits else {}),
        "datasets": [{"path": "json", "data_files": settings.data}],
        "max_length": settings.max_length,
        "#lora": "Plain LoRA on the layers that are factors. DoRA could not be corrected.",
        "use_peft": True,
        "lora_r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(settings.targets),
        "gradient_checkpointing": True,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        **settings.length,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": settings.adapter,
    }
    return {name: yaml(lines)}
