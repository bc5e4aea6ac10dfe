"""ms-swift: `swift sft --config FILE`."""

from __future__ import annotations

from collections.abc import Mapping

from emloc_tools.trainers.settings import Settings, heading, yaml

FOUR_BITS = {
    "#four bits": "The emulator's layers are held in 4 bits, by bitsandbytes.",
    "quant_method": "bnb",
    "quant_bits": 4,
}


def files(settings: Settings, name: str) -> Mapping[str, str]:
    """The configuration. ms-swift finds `messages` by their name; other columns are mapped to its own."""
    columns = {"prompt": {"prompt": "query", "completion": "response"}, "text": {"text": "response"}}
    mapped = {"columns": columns[settings.kind]} if settings.kind in columns else {}
    template = {} if settings.kind == "messages" else {"#plain": "The data holds whole texts.", "template": "dummy"}
    lines = {
        **heading(settings, f"swift sft {name}"),
        "model": settings.emulator,
        "#hub": "Nothing is looked up elsewhere; ms-swift runs the code in a model's folder in any case.",
        "use_hf": True,
        "torch_dtype": settings.dtype,
        **(FOUR_BITS if settings.four_bits else {}),
        **template,
        "dataset": [settings.data],
        **mapped,
        "split_dataset_ratio": 0,
        "max_length": settings.max_length,
        "#lora": "Plain LoRA on the layers that are factors.",
        "tuner_type": "lora",
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(settings.targets),
        "gradient_checkpointing": True,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        **settings.length,
        "logging_steps": 1,
        "#saved": "The LoRA is written to a folder checkpoint-<step> in this one.",
        "save_strategy": "epoch",
        "report_to": "none",
        "add_version": False,
        "output_dir": settings.adapter,
    }
    return {name: yaml(lines)}
