"""Train a LoRA on an EMLoC emulator with transformers and PEFT. Written by `emloc-tools trainer-config`.

    python THIS_FILE                       on one device
    accelerate launch THIS_FILE            on several

It needs transformers and PEFT, and nothing of emloc-tools. Paths are relative to where it is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

EMULATOR = "emulator"
TRUST_REMOTE_CODE = True  # the emulator's class is a file in its folder; without this it does not load
DATA = "train.jsonl"  # a line is an object with text, messages, or prompt and completion
ADAPTER = "lora"  # where the LoRA goes
DTYPE = "bfloat16"
FOUR_BITS = False  # hold the emulator in 4 bits, by bitsandbytes
TARGETS = ["q_proj", "v_proj"]
RANK = 16
ALPHA = 32
LEARNING_RATE = 2e-4
BATCH_SIZE = 1
ACCUMULATION = 8
EPOCHS = 1
STEPS: int | None = None  # in place of whole epochs
MAX_LENGTH = 2048
SEED = 0
NEXT = "emloc-tools correct"  # what to run afterwards


def main() -> None:
    """Load the emulator, put a LoRA on it, train, and save the LoRA."""
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(EMULATOR, trust_remote_code=TRUST_REMOTE_CODE)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = Path(DATA).read_text(encoding="utf-8").splitlines()
    samples = [encode(json.loads(line), tokenizer) for line in lines if line.strip()]
    training = arguments()
    model = AutoModelForCausalLM.from_pretrained(
        EMULATOR, dtype=getattr(torch, DTYPE), trust_remote_code=TRUST_REMOTE_CODE, **quantisation(training.device)
    )
    # Plain LoRA. DoRA's magnitudes would belong to the emulator, and inits such as PiSSA change its weights.
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = Trainer(
        get_peft_model(model, config),
        args=training,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100, which the loss ignores
        train_dataset=samples,
    )
    trainer.train()
    trainer.save_model(ADAPTER)
    if trainer.is_world_process_zero():
        print(f"the LoRA is in {ADAPTER}; now run {NEXT}")


def quantisation(device: torch.device) -> dict[str, Any]:
    """How bitsandbytes is to hold the emulator, if it is, and where."""
    if not FOUR_BITS:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, DTYPE),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def arguments() -> TrainingArguments:
    """The Trainer's settings."""
    return TrainingArguments(
        output_dir=ADAPTER,
        num_train_epochs=EPOCHS,
        max_steps=-1 if STEPS is None else STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        bf16=DTYPE == "bfloat16",
        fp16=DTYPE == "float16",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=SEED,
    )


def encode(record: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Token ids and labels. What stands before a `completion` gets no labels."""

    def chat(messages: list[dict[str, Any]], ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))

    prompt, special = "", True  # a chat template writes special tokens itself
    if "messages" in record:
        text, special = chat(record["messages"]), False
    elif "text" in record:
        text = record["text"]
    elif isinstance(record["prompt"], list):
        prompt, special = chat(record["prompt"], ask=True), False
        text = chat(record["prompt"] + record["completion"])
    else:
        prompt, text = record["prompt"], record["prompt"] + record["completion"]
    ids = tokenizer(text, add_special_tokens=special)["input_ids"][:MAX_LENGTH]
    # A tokenizer may join the prompt's last characters with the completion's first: labels begin where tokens differ.
    begin = tokenizer(prompt, add_special_tokens=special)["input_ids"] if prompt else []
    same = [a == b for a, b in zip(begin, ids, strict=False)]
    skipped = same.index(False) if False in same else len(same)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * skipped + ids[skipped:]}


if __name__ == "__main__":
    main()
