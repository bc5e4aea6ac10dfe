"""Train a LoRA on an EMLoC emulator with Unsloth and TRL. Written by `emloc-tools trainer-config`.

    python THIS_FILE

It needs Unsloth, and nothing of emloc-tools. Paths are relative to where it is run.
"""

from __future__ import annotations

from unsloth import FastLanguageModel  # isort: skip  (before TRL and transformers, which it changes)

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

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
    """Load the emulator, put a plain LoRA on it, train, and save the LoRA."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        EMULATOR,
        max_seq_length=MAX_LENGTH,
        dtype=getattr(torch, DTYPE),
        load_in_4bit=FOUR_BITS,
        trust_remote_code=TRUST_REMOTE_CODE,
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, random_state=SEED, use_gradient_checkpointing=True
    )
    settings = SFTConfig(
        output_dir=ADAPTER,
        num_train_epochs=EPOCHS,
        max_steps=-1 if STEPS is None else STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        max_length=MAX_LENGTH,
        bf16=DTYPE == "bfloat16",
        fp16=DTYPE == "float16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
    )
    data = load_dataset("json", data_files=DATA, split="train")
    SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=settings).train()
    model.save_pretrained(ADAPTER)
    print(f"the LoRA is in {ADAPTER}; now run {NEXT}")


if __name__ == "__main__":
    main()
