"""Bytes read, peak memory and time of the streamed backward against a backward in memory with gradient checkpointing.

    python -m benchmarks.backward

makes the random Llama checkpoints of `benchmarks.streaming`, and takes from each the second moments of the gradient of
the loss at every linear layer of a block: by the streamed backward, and by autograd in memory with the same taps, in
processes of their own. Both accumulate the same Grams; streamed ones go to disk when their unit is done. Runs
alternate; times are medians, and a ratio is the median of the ratios of neighbouring runs. CPU seconds count all cores
of the process. Peak memory is the process's largest resident size; `checkpoint` counts the tensors' bytes, `spilled`
the activations that were written to disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.streaming import VOCABULARY, WIDTHS, make, memory, spent, warm

# torch is imported by the workers only: on Linux a child's peak includes that of the process it came from.

GOALS = {"bytes_ratio": 2.0, "rss_spread": 1.05, "time_ratio": 1.3, "gram_difference": 1e-5}


def main() -> None:
    """Measure everything, print the table, write the results."""
    options = parse_arguments()
    if options.worker is not None:
        name, *paths = options.worker
        print(json.dumps(WORKERS[name](*map(Path, paths), options)))
        return
    with tempfile.TemporaryDirectory(prefix="emloc-backward-") as folder:
        rows = [measure(Path(folder), depth, options) for depth in options.depths]
    result = {
        **record.circumstances("backward"),
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
    if options.dry_run:
        print(markdown(result))
    else:
        record.write("backward", result, markdown(result))


def parse_arguments() -> argparse.Namespace:
    """The command line; `--worker` is for the processes that this one starts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backward", description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48], help="numbers of layers")
    parser.add_argument("--samples", type=int, default=16, help="samples, each a batch of its own")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs for each depth")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--dry-run", action="store_true", help="print the results without writing them")
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
        "spilled_bytes": runs["streamed"][0]["spilled"],
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
    command = [sys.executable, "-m", "benchmarks.backward", "--depths", str(depth)]
    command += ["--samples", str(options.samples), "--length", str(options.length)]
    command += ["--worker", worker, *map(str, paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{worker} {paths[0].name}: {answer}", file=sys.stderr)
    return answer


class Grams:
    """Sums of products of gradient rows, by layer; `write` moves those of a part of the model to disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.matrices: dict[str, Any] = {}
        folder.mkdir(exist_ok=True)

    def add(self, gradient: Any) -> None:
        import torch

        from emloc_tools.linalg.gram import accumulate

        rows = gradient.rows.reshape(-1, gradient.rows.shape[-1])
        if gradient.layer not in self.matrices:
            self.matrices[gradient.layer] = torch.zeros(rows.shape[1], rows.shape[1])
        accumulate(self.matrices[gradient.layer], rows)

    def write(self, prefix: str) -> None:
        from safetensors.torch import save_file

        done = {name: gram for name, gram in self.matrices.items() if name.startswith(prefix)}
        if done:
            save_file(done, self.folder / f"{prefix or 'all'}.safetensors")
        for name in done:
            del self.matrices[name]


def calls(model: Any, data: Path) -> Iterator[Any]:
    """The forward of every sample, with a loss over all its tokens."""
    from safetensors.torch import load_file

    samples = load_file(data)
    for number in range(len(samples)):
        ids = samples[f"{number}/input_ids"]
        yield functools.partial(model, input_ids=ids, labels=ids, use_cache=False)


def streamed(base: Path, data: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The streamed backward."""
    from emloc_tools.models.base import open_base
    from emloc_tools.models.layers import select_layers
    from emloc_tools.streaming.backward import BackwardLockStep

    warm()
    start, cpu = time.perf_counter(), time.process_time()
    opened = open_base(str(base))
    layers = select_layers(opened.model)
    grams = Grams(output)
    stream = BackwardLockStep(opened.model, opened.weights(), layers, spill=output)
    stream.on_gradient = lambda batch, gradient: grams.add(gradient)
    stream.on_backward_unit_done = lambda unit: grams.write(unit.name)
    stream.run_backward(list(calls(opened.model, data)), lambda batch, result: result.loss)
    stream.close()
    return {**spent(start, cpu), "bytes_read": opened.tensors.bytes_read, "spilled": stream.spilled}


def in_memory(base: Path, data: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The whole model in memory, one sample after the other, with gradient checkpointing and the same taps."""
    import transformers

    from emloc_tools.models.layers import select_layers
    from emloc_tools.streaming.gradients import tapped

    warm()
    start, cpu = time.perf_counter(), time.process_time()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()  # else transformers does not checkpoint; a Llama has no dropout
    grams = Grams(output)
    for layer in select_layers(model):
        module = model.get_submodule(layer.name)
        module.forward = tapped(layer, module.forward, grams.add)
    for call in calls(model, data):
        call().loss.backward()
    grams.write("")
    return spent(start, cpu)


def compare(streamed: Path, in_memory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The largest relative difference of a Gram, in the Frobenius norm."""
    from safetensors.torch import load_file

    ours, theirs = (
        {n: t for path in sorted(p.iterdir()) for n, t in load_file(path).items()} for p in (streamed, in_memory)
    )
    assert set(ours) == set(theirs)
    differences = [float((ours[name] - gram).norm() / gram.norm()) for name, gram in theirs.items()]
    return {"gram_difference": max(differences), "grams": len(theirs)}


WORKERS: dict[str, Any] = {"make": make, "streamed": streamed, "in_memory": in_memory, "compare": compare}


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    rows = result["rows"]
    met = {
        f"bytes read at most {GOALS['bytes_ratio']:.0f}x the checkpoint": all(
            row["bytes_ratio"] <= GOALS["bytes_ratio"] for row in rows
        ),
        f"peak memory flat over depth within {GOALS['rss_spread'] - 1:.0%} (largest to smallest "
        f"{result['rss_spread']:.3f}x, last depth to first {result['rss_growth']:.3f}x)": (
            result["rss_spread"] <= GOALS["rss_spread"]
        ),
        f"wall time at most {GOALS['time_ratio']:.1f}x": all(row["time_ratio"] <= GOALS["time_ratio"] for row in rows),
        f"Grams equal within {GOALS['gram_difference']:.0e}": all(
            row["gram_difference"] <= GOALS["gram_difference"] for row in rows
        ),
    }
    text = "# Streamed backward\n\n" + record.sentence(result) + "\n"
    text += (
        f"{result['samples']} samples of {result['length']} tokens, {result['repeats']} pair(s) of runs, "
        f"{result['threads']} thread(s) a process; load average at the end {result['load_average'][0]:.1f}. In memory "
        "means autograd with gradient checkpointing.\n\n"
        "| layers | checkpoint, MB | read | spilled, MB | peak, streamed, MB | peak, in memory, MB | streamed, s "
        "| in memory, s | wall time | CPU time | Grams | largest difference |\n"
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    for row in rows:
        ours, theirs = row["streamed"], row["in_memory"]
        text += (
            f"| {row['layers']} | {row['checkpoint_bytes'] / 1e6:.0f} | {row['bytes_ratio']:.4f}x "
            f"| {row['spilled_bytes'] / 1e6:.0f} | {ours['rss_bytes'] / 1e6:.0f} | {theirs['rss_bytes'] / 1e6:.0f} "
            f"| {ours['seconds']:.1f} | {theirs['seconds']:.1f} | {row['time_ratio']:.2f}x | {row['cpu_ratio']:.2f}x "
            f"| {row['grams']} | {row['gram_difference']:.1e} |\n"
        )
    return text + "\n" + "".join(f"- {goal}: {'met' if good else 'not met'}\n" for goal, good in met.items())


if __name__ == "__main__":
    main()
