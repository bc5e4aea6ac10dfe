"""What becomes of a task's new head: fitted on the base and frozen, or trained along with a LoRA on an emulator.

    python -m benchmarks.transfer.heads --folder FOLDER [--seeds 0,1,2] [--steps 100]

The bed `kinds`: a Python statement, and the label that says which kind it is. Every LoRA is judged on the base, on
held-out statements. Results go to `benchmarks/results/heads.json` and `.md`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from benchmarks import record
from benchmarks.transfer import beds
from benchmarks.transfer.__main__ import base_folder
from benchmarks.transfer.report import spread
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from emloc_tools.stages.fit_head import fit_head
from emloc_tools.stages.merge import merge

LENGTH, LEARNING_RATE, SAMPLES = 96, 4e-3, 64
BY_HEART = 0.001  # a weight decay so small that the head knows the training statements by heart
HELD_OUT = 140  # the rest is trained on
# By their names in the table: the ratio, and what `build_emulator` is asked for beside the calibration.
EMULATORS: dict[str, tuple[float, dict[str, Any]]] = {
    "0.25": (0.25, {}),
    "0.1": (0.1, {}),
    "0.1, paper": (0.1, {"weighting": "none", "allocation": "uniform"}),
}
ENDS = ("base, head fitted", "base, LoRA, head fitted and frozen")
WAYS = {
    "head fitted and frozen, uncorrected": "frozen",
    "head fitted and frozen": "frozen",
    "head fitted, then trained along": "fitted",
    "random head, trained along": "random",
}


def main() -> None:
    """Run every seed and ratio, then write the table."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(options.folder, ignore_errors=True)
    write_bed(options.folder)
    scores = []
    for decay, starts, wanted in (
        (None, ("frozen", "fitted", "random"), list(EMULATORS)),
        (BY_HEART, ("frozen",), ["0.25"]),
    ):
        folder = options.folder / ("chosen" if decay is None else "by-heart")
        fitted = fit_head(
            base=str(base_folder(options.folder, "shipped")),
            data=options.folder / "train.jsonl",
            output=folder / "headed",
            max_length=LENGTH,
            batch_size=8,
            held_out=0,
            weight_decay=decay,
        )
        print(
            f"{len(fitted.labels)} labels, decay {fitted.weight_decay:g} of {fitted.tried}: {fitted.fitted}", flush=True
        )
        for seed in map(int, options.seeds.split(",")):
            for row in run(folder, wanted, starts, seed, options.steps):
                scores.append({"decay": fitted.weight_decay, "seed": seed, **row})
                print(json.dumps(scores[-1]), flush=True)
    table = summary(scores)
    figures = {
        **record.circumstances("transfer.heads"),
        "scores": [{**dict(zip(KEYS, key, strict=True)), **value} for key, value in table.items()],
    }
    figures["command"] = "python -m benchmarks.transfer.heads --folder FOLDER"
    record.write("heads", figures, text(figures, table))


def write_bed(folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl`: statements with their kinds as labels; the same on every run."""
    folder.mkdir(parents=True)
    records = [
        {"text": question["prompt"].splitlines()[0], "label": question["completion"].strip()}
        for question in beds.questions()
    ]
    random.Random(0).shuffle(records)
    for part, chosen in (("heldout", records[:HELD_OUT]), ("train", records[HELD_OUT:])):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def run(folder: Path, emulators: Sequence[str], starts: Sequence[str], seed: int, steps: int) -> list[dict[str, Any]]:
    """The scores of one seed: the two ends, and every start of the head on every emulator."""
    work, headed = folder / f"seed-{seed}", folder / "headed"
    data, held_out = folder.parent / "train.jsonl", folder.parent / "heldout.jsonl"
    work.mkdir()
    train(headed, data, work / "on-base", "frozen", seed, steps)
    found = measure(headed, held_out, [work / "on-base"])
    rows = [{"emulator": "", "way": way, **score} for way, score in zip(ENDS, found, strict=True)]
    shared: dict[str, Any] = {"max_length": LENGTH, "seed": seed, "dtype": "float32"}
    calibration = work / "calibration"
    calibrate(base=str(headed), data=data, samples=SAMPLES, gradients=True, output=calibration, **shared)
    for number, name in enumerate(emulators):
        emulator = work / f"emulator-{number}"
        ratio, built = EMULATORS[name]
        build_emulator(base=str(headed), calibration=calibration, ratio=ratio, output=emulator, **built)
        for start in starts:
            lora, corrected = work / f"{start}-{number}", work / f"{start}-{number}-corrected"
            train(emulator, data, lora, start, seed, steps)
            correct(emulator=emulator, adapter=lora, base=str(headed), output=corrected)
            if start == "frozen":
                scores = measure(headed, held_out, [lora, corrected])[1:]
            else:  # the adapter holds a head of its own, which only a merged model has in its place
                merged = work / f"{start}-{number}-merged"
                merge(base=str(headed), adapter=corrected, output=merged)
                scores = measure(merged, held_out, [])
            ways = [way for way, its_start in WAYS.items() if its_start == start]
            rows += [{"emulator": name, "way": way, **score} for way, score in zip(ways, scores, strict=True)]
    return rows


def train(model: Path, data: Path, output: Path, start: str, seed: int, steps: int) -> None:
    """Train a LoRA with transformers and PEFT alone. `start` is that of the head; only "frozen" leaves it as it is."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=model.name.startswith("emulator")
    )
    if start == "random":
        torch.nn.init.normal_(classifier.score.weight, std=classifier.config.initializer_range)
    size: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    head = {"exclude_modules": ["score"]} if start == "frozen" else {"task_type": "SEQ_CLS"}
    lora = get_peft_model(classifier, LoraConfig(**size, **head))
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
        seed=seed,
    )
    samples = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    encoded = [
        {
            **tokenizer(sample["text"], truncation=True, max_length=LENGTH, return_token_type_ids=False),
            "labels": classifier.config.label2id[sample["label"]],
        }
        for sample in samples
    ]
    trainer = Trainer(lora, args=arguments, data_collator=DataCollatorWithPadding(tokenizer), train_dataset=encoded)
    trainer.remove_callback(PrinterCallback)
    with redirect_stdout(io.StringIO()):
        trainer.train()
    lora.save_pretrained(output)


def measure(model: Path, data: Path, adapters: Sequence[Path]) -> list[dict[str, float]]:
    """Loss and accuracy of a model on held-out statements, and of it with each adapter."""
    options: dict[str, Any] = {"data": data, "max_length": LENGTH, "batch_size": 8, "dtype": "float32"}
    results = evaluate(base=str(model), adapters=adapters, **options)
    # A classifier's results have an accuracy, all of them.
    return [{"loss": r.loss, "accuracy": r.accuracy} for r in results if r.accuracy is not None]


KEYS = ("decay", "emulator", "way")
Key = tuple[float, str, str]


def summary(scores: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, float]]:
    """Mean and standard deviation over the seeds."""
    groups: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for score in scores:
        groups[score["decay"], score["emulator"], score["way"]].append(score)
    return {
        key: {
            "seeds": len(group),
            **{name: mean(score[name] for score in group) for name in ("loss", "accuracy")},
            **{f"{name}_std": spread(score[name] for score in group) for name in ("loss", "accuracy")},
        }
        for key, group in groups.items()
    }


def text(figures: Mapping[str, Any], table: Mapping[Key, Mapping[str, float]]) -> str:
    """The table in Markdown."""
    lines = [
        "# A new head",
        "",
        "| weight decay | emulator | LoRA and head | loss | accuracy |",
        "|--:|---|---|--:|--:|",
    ]
    for (decay, emulator, way), value in table.items():
        loss = f"{value['loss']:.3f} ± {value['loss_std']:.3f}"
        accuracy = f"{value['accuracy']:.1%} ± {value['accuracy_std']:.1%}"
        lines.append(f"| {decay:g} | {emulator} | {way} | {loss} | {accuracy} |")
    return "\n".join([*lines, "", record.sentence(figures)]) + "\n"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer.heads", description="See the docstring.")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, emptied first")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100, help="of every training, eight samples each")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
