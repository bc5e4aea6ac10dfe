"""Bytes read, peak memory and time of calibrate's streamed forward against the same forward in memory.

    python -m benchmarks.streaming

makes random Llama checkpoints of 12, 24 and 48 layers in a temporary folder (3.5 GB of disk), and calibrates each by
`calibrate`, which streams, and by a plain forward in memory with hooks that is written here, in processes of their own.
Both take the same Grams and write them to disk. Runs alternate; times are medians, and a ratio is the median of the
ratios of neighbouring runs. CPU seconds count all cores of the process and suffer less from other load than wall
seconds do. Peak memory is the process's largest resident size; `checkpoint` counts the tensors' bytes. The weights are
random, which does not matter here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

# torch is imported by the workers only: on Linux a child's peak includes that of the process it came from.

GOALS = {"bytes_ratio": 1.0, "rss_spread": 1.05, "time_ratio": 1.1}
WIDTHS = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
VOCABULARY = 8192
# The layers of a block that read one tensor.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def main() -> None:
    """Measure everything, print the table, write the results."""
    options = parse_arguments()
    if options.worker is not None:
        name, *paths = options.worker
        print(json.dumps(WORKERS[name](*map(Path, paths), options)))
        return
    with tempfile.TemporaryDirectory(prefix="emloc-streaming-") as folder:
        rows = [measure(Path(folder), depth, options) for depth in options.depths]
    result = {
        **record.circumstances("streaming"),
        "load_average": os.getloadavg(),
        "goals": GOALS,
        "widths": {**WIDTHS, "vocab_size": VOCABULARY},
        "samples": options.samples,
        "length": options.length,
        "threads": options.threads,
        "repeats": options.repeats,
        "rows": rows,
        **memory(rows),
    }
    record.write("streaming", result, markdown(result))


def memory(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Peak memory over the depths: the largest to the smallest, and that of the last depth to that of the first."""
    peaks = [row["streamed"]["rss_bytes"] for row in rows]
    return {"rss_spread": max(peaks) / min(peaks), "rss_growth": peaks[-1] / peaks[0]}


def parse_arguments() -> argparse.Namespace:
    """The command line; `--worker` is for the processes that this one starts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48], help="numbers of layers")
    parser.add_argument("--samples", type=int, default=16, help="samples, each a batch of its own")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs for each depth")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(folder: Path, depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """One depth: alternating pairs of runs, their medians, and the largest difference of their Grams."""
    base, data, streamed, plain = (folder / f"{name}-{depth}" for name in ("base", "data", "streamed", "in-memory"))
    data = data.with_suffix(".safetensors")
    made = run("make", [base, data], options, depth)
    runs: dict[str, list[dict[str, Any]]] = {"streamed": [], "in_memory": []}
    for repeat in range(options.repeats):
        order = ("streamed", "in_memory") if repeat % 2 == 0 else ("in_memory", "streamed")
        for name in order:
            runs[name].append(run(name, [base, data, streamed if name == "streamed" else plain], options))
    pairs = list(zip(runs["streamed"], runs["in_memory"], strict=True))
    return {
        "layers": depth,
        "checkpoint_bytes": made["nbytes"],
        "bytes_ratio": max(one["bytes_read"] for one in runs["streamed"]) / made["nbytes"],
        **{
            name: {
                "rss_bytes": max(one["rss_bytes"] for one in several),
                **{key: statistics.median(one[key] for one in several) for key in ("seconds", "cpu_seconds")},
            }
            for name, several in runs.items()
        },
        "time_ratio": statistics.median(one["seconds"] / other["seconds"] for one, other in pairs),
        "cpu_ratio": statistics.median(one["cpu_seconds"] / other["cpu_seconds"] for one, other in pairs),
        "runs": runs,
        **run("compare", [streamed, plain], options),
    }


def run(worker: str, paths: Sequence[Path], options: argparse.Namespace, depth: int = 0) -> dict[str, Any]:
    """Run a worker in a process of its own and return what it prints last."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--depths", str(depth)]
    command += ["--samples", str(options.samples), "--length", str(options.length)]
    command += ["--worker", worker, *map(str, paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{worker} {paths[0].name}: {answer}", file=sys.stderr)
    return answer


def make(base: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A random Llama in bfloat16, in shards, and samples of random tokens."""
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    (depth,) = options.depths
    config = transformers.LlamaConfig(**WIDTHS, vocab_size=VOCABULARY, num_hidden_layers=depth, dtype="bfloat16")
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(base, max_shard_size="200MB")
    ids = torch.randint(VOCABULARY, (options.samples, 1, options.length))
    save_file({f"{number}/input_ids": sample.contiguous() for number, sample in enumerate(ids)}, data)
    return {"nbytes": sum(parameter.nbytes for parameter in model.parameters())}


def streamed(base: Path, data: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The stage `calibrate`."""
    from emloc_tools.stages.calibrate import calibrate

    warm()
    start, cpu = time.perf_counter(), time.process_time()
    result = calibrate(base=str(base), data=data, output=output, device="cpu", samples=None, overwrite=True)
    return {**spent(start, cpu), "bytes_read": result.bytes_read}


def in_memory(base: Path, data: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The whole model in memory, one sample after the other, with hooks that take the Grams of GROUPS."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from emloc_tools.linalg.gram import accumulate, smaller_side
    from emloc_tools.models.layers import describe

    warm()
    start, cpu = time.perf_counter(), time.process_time()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    grams: dict[str, torch.Tensor] = {}

    def add(name: str, tensor: torch.Tensor) -> None:
        rows = tensor.reshape(-1, tensor.shape[-1])
        if name not in grams:
            grams[name] = torch.zeros(rows.shape[1], rows.shape[1])
        accumulate(grams[name], rows)

    for block in range(model.config.num_hidden_layers):
        for group in GROUPS:
            names = [f"model.layers.{block}.{part}" for part in group]
            modules = [model.get_submodule(name) for name in names]
            if smaller_side([describe(name, module) for name, module in zip(names, modules, strict=True)]) == "input":
                modules[0].register_forward_hook(lambda module, args, output, name=names[0]: add(name, args[0]))
                continue
            for name, module in zip(names, modules, strict=True):
                module.register_forward_hook(lambda module, args, output, name=name: add(name, output))
    samples = load_file(data)
    with torch.no_grad():
        for number in range(len(samples)):
            model(input_ids=samples[f"{number}/input_ids"], use_cache=False, logits_to_keep=1)
    output.mkdir(exist_ok=True)
    save_file(grams, output / "grams.safetensors")
    return spent(start, cpu)


def compare(streamed: Path, in_memory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The largest relative difference of a Gram, in the Frobenius norm, and how many Grams are equal bit for bit."""
    from safetensors.torch import load_file

    from emloc_tools.files.calibration import Calibration

    calibration, grams = Calibration(streamed), load_file(in_memory / "grams.safetensors")
    assert len(calibration.manifest.grams) == len(grams)
    pairs = [(calibration.gram(name).matrix, gram) for name, gram in grams.items()]
    return {
        "gram_difference": max(float((one - other).norm() / other.norm()) for one, other in pairs),
        "grams": len(grams),
        "equal_grams": sum(bool(one.tril().equal(other.tril())) for one, other in pairs),
    }


WORKERS: dict[str, Any] = {"make": make, "streamed": streamed, "in_memory": in_memory, "compare": compare}


def warm() -> None:
    """Import what both ways of calibrating need, so that no import is timed."""
    import transformers

    _ = transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM


def spent(start: float, cpu: float) -> dict[str, Any]:
    """Time since `start`, and the process's largest resident size."""
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "rss_bytes": int(peak) * 1024}


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    rows = result["rows"]
    met = {
        f"every byte of the checkpoint read once ({GOALS['bytes_ratio']:.2f}x)": all(
            row["bytes_ratio"] == GOALS["bytes_ratio"] for row in rows
        ),
        f"peak memory flat over depth within {GOALS['rss_spread'] - 1:.0%} (largest to smallest "
        f"{result['rss_spread']:.3f}x, last depth to first {result['rss_growth']:.3f}x)": (
            result["rss_spread"] <= GOALS["rss_spread"]
        ),
        f"wall time at most {GOALS['time_ratio']:.1f}x": all(row["time_ratio"] <= GOALS["time_ratio"] for row in rows),
        "Grams equal bit for bit": all(row["equal_grams"] == row["grams"] for row in rows),
    }
    text = "# Streamed calibration\n\n" + record.sentence(result) + "\n"
    text += (
        f"{result['samples']} samples of {result['length']} tokens, {result['repeats']} pair(s) of runs, "
        f"{result['threads']} thread(s) a process; load average at the end {result['load_average'][0]:.1f}.\n\n"
        "| layers | checkpoint, MB | read | peak, streamed, MB | peak, in memory, MB | streamed, s | in memory, s "
        "| wall time | CPU time | equal Grams | largest difference |\n"
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    for row in rows:
        ours, theirs = row["streamed"], row["in_memory"]
        text += (
            f"| {row['layers']} | {row['checkpoint_bytes'] / 1e6:.0f} | {row['bytes_ratio']:.4f}x "
            f"| {ours['rss_bytes'] / 1e6:.0f} | {theirs['rss_bytes'] / 1e6:.0f} "
            f"| {ours['seconds']:.1f} | {theirs['seconds']:.1f} | {row['time_ratio']:.2f}x | {row['cpu_ratio']:.2f}x "
            f"| {row['equal_grams']} of {row['grams']} | {row['gram_difference']:.1e} |\n"
        )
    return text + "\n" + "".join(f"- {goal}: {'met' if good else 'not met'}\n" for goal, good in met.items())


if __name__ == "__main__":
    main()
