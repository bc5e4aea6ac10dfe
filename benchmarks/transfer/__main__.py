"""What a LoRA that was trained on a stand-in is worth on the base.

    python -m benchmarks.transfer --folder FOLDER [--bases shipped,small] [--beds far,near,skill] [--seeds 0,1,2] …

Every finished cell is a line of `FOLDER/cells.jsonl`; a run that was interrupted goes on with the next one. At the end
`benchmarks/results/transfer.json` and `.md` hold means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import time
from importlib import resources
from pathlib import Path

import torch

from benchmarks.transfer import beds, cells, report
from emloc_tools.demo import make_base

SMALL_STEPS, SMALL_HIDDEN = 600, 128  # of the second base


def main() -> None:
    """Run the cells that are missing, then write the tables."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    record = options.folder / "cells.jsonl"
    for base in options.bases.split(","):
        for bed in options.beds.split(","):
            for seed in map(int, options.seeds.split(",")):
                done = {line["cell"] for line in read(record)}  # anew: several runs may share the folder
                wanted = [c for c in all_cells(options, base, bed, seed) if c.name not in done]
                if wanted:
                    run(options, base, bed, seed, wanted, record)
    report.write(read(record), options.folder)


def all_cells(options: argparse.Namespace, base: str, bed: str, seed: int) -> list[cells.Cell]:
    """The cells of a group, in order."""
    kinds = tuple(options.kinds.split(","))
    return list(cells.cells(base, bed, seed, kinds, tuple(map(float, options.ratios.split(",")))))


def run(options: argparse.Namespace, base: str, bed: str, seed: int, wanted: list[cells.Cell], record: Path) -> None:
    """Run cells of one group and append their scores."""
    data = options.folder / "beds" / bed
    if not (data / "validation.jsonl").exists():
        beds.write(bed, data)
    folder = base_folder(options.folder, base)
    group = cells.Group(folder, bed, seed, data, options.folder / "work" / f"{base}-{bed}-{seed}", options.steps)
    for cell in wanted:
        started = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):  # the trainer's lines
            scores = group.run(cell)
        keys = {"base": base, "bed": bed, "seed": seed, "kind": cell.kind, "ratio": cell.ratio}
        with record.open("a", encoding="utf-8") as file:
            for score in scores:
                file.write(json.dumps({"cell": cell.name, **keys, **score}) + "\n")
        best = ", ".join(f"{score['variant']} {score['loss']:.3f}" for score in scores)
        print(f"{cell.name}: {best} ({time.monotonic() - started:.0f} s)", flush=True)


def base_folder(folder: Path, base: str) -> Path:
    """The shipped base, or a smaller one of the same text and tokenizer, which is trained when it is first needed."""
    if base == "shipped":
        return Path(str(resources.files("emloc_tools.demo"))) / "base"
    output = folder / "bases" / base
    if not (output / "README.md").exists():
        print(f"training the base {base}", flush=True)
        arguments = ["--output", output, "--steps", SMALL_STEPS, "--hidden-size", SMALL_HIDDEN]
        make_base.main(list(map(str, arguments)))
    return output


def read(record: Path) -> list[dict[str, object]]:
    """All scores so far."""
    if not record.exists():
        return []
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description="See the module's docstring.")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; kept, so that a run can go on")
    parser.add_argument("--bases", default="shipped,small")
    parser.add_argument("--beds", default=",".join(beds.BEDS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ratios", default=",".join(map(str, cells.RATIOS)))
    parser.add_argument("--kinds", default=",".join(cells.KINDS))
    parser.add_argument("--steps", type=int, default=60, help="of every training, eight samples each")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
