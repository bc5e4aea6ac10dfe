"""Train a LoRA with transformers and PEFT, as anyone might: this script knows nothing of emloc-tools.

python train_lora.py --model FOLDER_OR_ID --data train.jsonl --output lora [--trust-remote-code]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging


def main(arguments: list[str] | None = None) -> None:
    """Load the model, put a LoRA on every linear layer, train it, save the adapter and a few figures."""
    options = parse_arguments(arguments)
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(options.seed)
    trust = {"trust_remote_code": options.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **trust)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with options.data.open(encoding="utf-8") as lines:
        samples = [encode(json.loads(line), tokenizer, options.max_length) for line in lines if line.strip()]
    figures: dict[str, Any] = {"idle_bytes": peak_memory()}
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **trust)
    figures["model_parameters"] = sum(weight.numel() for weight in base.parameters())
    figures["model_parameter_bytes"] = sum(weight.nbytes for weight in base.parameters())
    size = {"r": options.rank, "lora_alpha": options.alpha}
    model = get_peft_model(base, LoraConfig(**size, target_modules="all-linear", task_type="CAUSAL_LM"))
    figures["trainable_parameters"], _ = model.get_nb_trainable_parameters()
    figures |= train(model, tokenizer, samples, options)
    model.save_pretrained(options.output)
    figures["peak_bytes"] = peak_memory()
    (options.output / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"trained {options.steps} steps in {figures['seconds']:.0f} s; the adapter is in {options.output}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(arguments)


def encode(record: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Token ids and labels of a `text`, of `messages`, or of a `prompt` (no labels) and its `completion`."""
    prompt, text, special = texts(record, tokenizer)
    ids = tokenizer(text, add_special_tokens=special)["input_ids"][:max_length]
    skipped = common_prefix(tokenizer(prompt, add_special_tokens=special)["input_ids"], ids) if prompt else 0
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * skipped + ids[skipped:]}


def texts(record: dict[str, Any], tokenizer: Any) -> tuple[str, str, bool]:
    """The part that is not learnt, the whole text, and whether the tokenizer is to add special tokens.

    A chat template writes them itself. Of a `prompt` of messages it also writes what asks for the answer.
    """

    def chat(messages: list[dict[str, Any]], ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))

    if "messages" in record:
        return "", chat(record["messages"]), False
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list):
            return chat(prompt, ask=True), chat(prompt + completion), False
        return prompt, prompt + completion, True
    return "", record["text"], True


def common_prefix(first: list[int], second: list[int]) -> int:
    """How many tokens agree. The prompt's last ones may not: a tokenizer may join them with the completion's first."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def train(model: Any, tokenizer: Any, samples: list[dict[str, list[int]]], options: Any) -> dict[str, Any]:
    """Train the LoRA and return the first and last loss, the steps and the seconds."""
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        logging_steps=max(1, options.steps // 10),
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100, which the loss ignores
    trainer = Trainer(model, args=arguments, data_collator=collator, train_dataset=samples, callbacks=[LossLines()])
    trainer.remove_callback(PrinterCallback)
    seconds = trainer.train().metrics["train_runtime"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"first_loss": losses[0], "last_loss": losses[-1], "steps": options.steps, "seconds": seconds}


class LossLines(TrainerCallback):  # type: ignore[misc]
    """One short line per logged loss, instead of the Trainer's dictionaries."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the step and its loss."""
        if logs and "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.3f}", flush=True)


def peak_memory() -> int:
    """Largest use of GPU memory so far, else the largest resident size of this process, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, where getrusage counts the memory of the process that started this one, too
        peak = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    # macOS counts in bytes, others in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
