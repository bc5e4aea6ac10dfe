"""LLaMA-Factory: `llamafactory-cli train FILE`. It finds data by `dataset_info.json` in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from emloc_tools.trainers.settings import DataKind, Settings, heading, yaml

INFO = "dataset_info.json"
FOUR_BITS = {
    "#four bits": "The emulator's layers are held in 4 bits, by bitsandbytes.",
    "quantization_method": "bnb",
    "quantization_bit": 4,
    "quantization_type": "nf4",
    "double_quantization": True,
}
COLUMNS: dict[DataKind, dict[str, Any]] = {
    "text": {"columns": {"prompt": "text"}},
    "messages": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "prompt": {"columns": {"prompt": "prompt", "response": "completion"}},
}


def files(settings: Settings, name: str) -> Mapping[str, str]:
    """The configuration, and `dataset_info.json` beside it. The data's path in it is absolute."""
    folder, data = str(PurePath(name).parent), str(Path(settings.data).absolute())
    info = {"emloc": {"file_name": data, **COLUMNS[settings.kind]}}
    lines = {
        **heading(settings, f"llamafactory-cli train {name}"),
        "model_name_or_path": settings.emulator,
        "#trust": "The emulator's class is a file in its folder; without this it does not load.",
        "trust_remote_code": True,
        "stage": "pt" if settings.kind == "text" else "sft",
        "do_train": True,
        "#template": _template(settings.kind),
        **({"template": "empty"} if settings.kind != "messages" else {}),
        "dataset_dir": folder,
        "dataset": "emloc",
        "cutoff_len": settings.max_length,
        "#lora": "Plain LoRA on the layers that are factors.",
        "finetuning_type": "lora",
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "lora_target": ",".join(settings.targets),
        "#dtype": "Without one of these the weights become float32.",
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        **(FOUR_BITS if settings.four_bits else {}),
        "#checkpointing": "Gradient checkpointing is on unless disable_gradient_checkpointing is set.",
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
    return {name: yaml(lines), str(PurePath(name).with_name(INFO)): json.dumps(info, indent=2) + "\n"}


def _template(kind: DataKind) -> str:
    if kind == "messages":
        return "Without a template LLaMA-Factory takes the tokenizer's own; name one if it cannot, such as llama3."
    return "The data holds whole texts: nothing is put around them."
