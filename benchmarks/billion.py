"""Every stage on a random Llama of 1.2 billion parameters, each in a process of its own: time, memory, disk.

    python -m benchmarks.billion

takes more than ten minutes of one CPU core and more than 5 GB of disk, and writes `benchmarks/results/billion.json` and
`.md`. The shapes are those of Llama 3.2 1B, and calibration is with gradients. The weights are random, so losses mean
nothing here; what is measured does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import record

# torch is imported by the stages' processes only: on Linux a child's peak includes that of the process it came from.

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "emloc_tools" / "demo"
GOAL = 2.5e9  # bytes; peak memory of a stage of emloc-tools
SHAPES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,  # those of the demo's tokenizer
    "bos_token_id": None,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Row:
    """One process: wall time, processor time of all cores, largest resident size, and what it wrote.

    `ours` is a stage of emloc-tools.
    """

    stage: str
    ours: bool
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    disk_bytes: int


def main() -> None:
    """Run everything, print the table, write the results."""
    options = parse_arguments()
    os.environ.update({"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"})  # of all processes below
    if options.make_base is not None:
        make_base(options.make_base)
        return
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        rows = run(options.folder, options)
    else:
        with tempfile.TemporaryDirectory(prefix="emloc-billion-") as folder:
            rows = run(Path(folder), options)
    result = {
        **record.circumstances("billion"),
        "load_average": os.getloadavg(),
        "threads": options.threads,
        "shapes": SHAPES,
        "samples": options.samples,
        "max_length": options.max_length,
        "ratio": options.ratio,
        "training_steps": options.steps,
        "goal_bytes": GOAL,
        "rows": [asdict(row) for row in rows],
    }
    record.write("billion", result, markdown(result))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep everything here  [default: a temporary folder]")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=32, help="to calibrate on; a quarter as many to evaluate on")
    parser.add_argument("--max-length", type=int, default=128, help="tokens per sample")
    parser.add_argument("--steps", type=int, default=3, help="of training, two samples each")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--make-base", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(folder: Path, options: argparse.Namespace) -> list[Row]:
    """All stages, one after the other."""
    base, calibration, emulator = folder / "base", folder / "calibration", folder / "emulator"
    adapter, corrected, refined = folder / "adapter", folder / "corrected", folder / "refined"
    ours = [sys.executable, "-m", "emloc_tools"]
    length = ["--max-length", options.max_length]
    training, held_out = (["--data", DEMO / "data" / f"{name}.jsonl", *length] for name in ("train", "heldout"))
    training_samples = ["--samples", options.samples]
    steps = ["--steps", 2, "--samples-per-step", options.samples]
    held_out_samples = ["--samples", max(1, options.samples // 4)]
    build = ["--calibration", calibration, "--ratio", options.ratio]
    # Away from the package: a script such as anyone's, with transformers and PEFT.
    train = [sys.executable, shutil.copy(DEMO / "train_lora.py", folder), *training]
    train += ["--steps", options.steps, "--batch-size", 2, "--dtype", "bfloat16"]
    return [
        measure("make the base", [sys.executable, "-m", "benchmarks.billion", "--make-base", base], base, ours=False),
        measure(
            "calibrate --gradients",
            [*ours, "calibrate", "--gradients", "--base", base, *training, *training_samples, "--output", calibration],
            calibration,
        ),
        measure("build-emulator", [*ours, "build-emulator", "--base", base, *build, "--output", emulator], emulator),
        measure(
            "train a LoRA on the emulator",
            [*train, "--model", emulator, "--trust-remote-code", "--output", adapter],
            adapter,
            ours=False,
        ),
        measure(
            "correct",
            [*ours, "correct", "--emulator", emulator, "--adapter", adapter, "--base", base, "--output", corrected],
            corrected,
        ),
        measure(
            "refine, 2 steps",
            [*ours, "refine", "--base", base, "--adapter", corrected, *training, *steps, "--output", refined],
            refined,
        ),
        measure(
            "evaluate the base and the corrected LoRA",
            [*ours, "evaluate", "--base", base, "--adapter", corrected, *held_out, *held_out_samples],
        ),
        measure(
            "train a LoRA on the base, to compare",
            [*train, "--model", base, "--output", folder / "direct"],
            folder / "direct",
            ours=False,
        ),
    ]


def measure(stage: str, command: Sequence[object], output: Path | None = None, *, ours: bool = True) -> Row:
    """Run one command as a process. Raises `CalledProcessError` if it fails."""
    print(f"\n== {stage}", flush=True)
    arguments = [str(part) for part in command]
    start = time.perf_counter()
    process = subprocess.Popen(arguments, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)  # unlike RUSAGE_CHILDREN, of this one child
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    disk = 0 if output is None else sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Row(stage, ours, seconds, usage.ru_utime + usage.ru_stime, peak, disk)


def make_base(folder: Path) -> None:
    """Write a random Llama in bfloat16, one shard for the embedding and one for each layer; no more is ever held."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for number, names in enumerate(groups.values(), 1):
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            is_norm = tensor.dim() == 1
            tensors[name] = tensor.fill_(1) if is_norm else tensor.normal_(0, 0.02, generator=generator)
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.save_pretrained(folder)
    for path in (DEMO / "base").glob("*token*"):
        shutil.copy(path, folder)


def markdown(result: dict[str, Any]) -> str:
    """The results for people. GB are 10^9 bytes."""
    lines = [
        "# A base of 1.2 billion parameters, stage by stage",
        "",
        record.sentence(result),
        f"{result['samples']} samples of up to {result['max_length']} tokens, ratio {result['ratio']:g}, bfloat16,",
        f"{result['training_steps']} training steps of two samples, {result['threads']} thread(s) a process;",
        f"load average at the end {result['load_average'][0]:.1f}. Random weights: losses would mean nothing.",
        "",
        "| process | of emloc-tools | time, s | CPU time, s | peak memory, GB | written, GB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        whose = "yes" if row["ours"] else ""
        figures = f"{row['peak_rss_bytes'] / 1e9:.2f} | {row['disk_bytes'] / 1e9:.2f}"
        lines.append(f"| {row['stage']} | {whose} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | {figures} |")
    peak = max(row["peak_rss_bytes"] for row in result["rows"] if row["ours"])
    verdict = "met" if peak <= result["goal_bytes"] else "not met"
    goal = f"peak memory of every stage of emloc-tools at most {result['goal_bytes'] / 1e9:g} GB"
    lines += ["", f"- {goal} (the largest is {peak / 1e9:.2f}): {verdict}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
