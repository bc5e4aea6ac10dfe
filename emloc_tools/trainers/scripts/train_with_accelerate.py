"""Train a LoRA on an EMLoC emulator by a plain loop on accelerate. Written by `emloc-tools trainer-config`.

    accelerate launch THIS_FILE                                                  as `accelerate config` was answered
    accelerate launch --multi_gpu --num_processes 2 THIS_FILE                    a copy of the emulator on each device
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 \\
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP THIS_FILE                 one copy, in shards on all devices

It needs accelerate, transformers and PEFT, and nothing of emloc-tools. Paths are relative to where it is run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq

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
BATCH_SIZE = 1  # of each process
ACCUMULATION = 8
EPOCHS = 1
STEPS: int | None = None  # in place of whole epochs
MAX_LENGTH = 2048
SEED = 0
NEXT = "emloc-tools correct"  # what to run afterwards


def main() -> None:
    """Load the emulator, put a LoRA on it, train, and save the LoRA."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(EMULATOR, trust_remote_code=TRUST_REMOTE_CODE)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = Path(DATA).read_text(encoding="utf-8").splitlines()
    samples: Any = [encode(json.loads(line), tokenizer) for line in lines if line.strip()]
    model = adapted_model(accelerator.device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE)
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100, which the loss ignores
    loader: Any = torch.utils.data.DataLoader(samples, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.print(f"processes: {accelerator.num_processes} ({accelerator.distributed_type.value})")
    train(accelerator, model, optimizer, loader)
    # Of a model in shards every process holds a part, and all of them must take part in putting it together.
    trained = {name: whole(weight) for name, weight in named_trained(accelerator.unwrap_model(model))}
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(ADAPTER, state_dict=trained)
        print(f"the LoRA is in {ADAPTER}; now run {NEXT}")
    accelerator.wait_for_everyone()  # a process that leaves early takes the others' connections with it
    accelerator.end_training()


def adapted_model(device: torch.device) -> Any:
    """The emulator with a plain LoRA: DoRA's magnitudes would belong to the emulator, and PiSSA changes its weights."""
    model = AutoModelForCausalLM.from_pretrained(
        EMULATOR, dtype=getattr(torch, DTYPE), trust_remote_code=TRUST_REMOTE_CODE, **quantisation(device)
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


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


def train(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    """Gradient steps until `STEPS` or `EPOCHS` are done, with the learning rate along half a cosine."""
    total = STEPS or EPOCHS * math.ceil(len(loader) / ACCUMULATION)
    step, losses = 0, []
    while step < total:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                losses.append(accelerator.reduce(loss.detach(), "mean"))
                accelerator.backward(loss)
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / total)) / 2
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                accelerator.print(f"step {step}: loss {float(sum(losses)) / len(losses):.4f}", flush=True)
                losses = []
            if step == total:
                break


def named_trained(model: Any) -> list[tuple[str, Any]]:
    """The weights that were trained, by their names in the model."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def whole(weight: Any) -> torch.Tensor:
    """A weight on the CPU, put together where processes hold it in shards."""
    full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full.detach().cpu()  # type: ignore[no-any-return]


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
