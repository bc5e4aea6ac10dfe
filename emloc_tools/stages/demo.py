"""demo: the whole method on one machine, each stage in a process of its own that sees only files.

The training is an ordinary script of transformers and PEFT (`emloc_tools/demo/train_lora.py`), copied out of the
package.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emloc_tools.errors import EmlocError, InputError
from emloc_tools.files.folders import check_output, new_folder, write_json, write_text
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.refusals import require_apart

RATIOS = (0.25, 0.1)
LENGTH = 256  # tokens of a sample, in every stage
BATCH = 8  # samples that a refinement runs at a time, as the trainer does
HELD_OUT_PART = 10  # one line in so many of the user's own data
FEWEST_LINES = 20
TRAINER = "train_lora.py"
OWN_MODEL = {"learning_rate": 6e-3, "dtype": "float32"}  # found for the small model that is shipped
USER_MODEL = {"learning_rate": 2e-4, "dtype": "auto"}


@dataclass(frozen=True)
class Score:
    """A model with an adapter on the held-out text: loss in nats per token, and the part of tokens predicted rightly.

    `model` is `base` or `emulator`, `ratio` the emulator's that the adapter was trained on, None where there is none;
    `adapter` is `none`, `trained on the base`, `uncorrected`, `corrected` or `refined`.
    """

    model: str
    ratio: float | None
    adapter: str
    loss: float
    perplexity: float
    accuracy: float


@dataclass(frozen=True)
class Training:
    """One run of the trainer. `peak_bytes` is the process's largest resident size, or the GPU's allocated memory.

    `idle_bytes` was in use before the model was loaded, `parameter_bytes` is the size of the frozen model.
    """

    ratio: float | None
    seconds: float
    peak_bytes: int
    idle_bytes: int
    parameters: int
    parameter_bytes: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and the commands that anyone can run again inside `output`."""

    output: Path
    base: str
    scores: list[Score]
    trainings: list[Training]
    commands: list[str]
    seconds: float

    def loss(self, model: str, ratio: float | None, adapter: str) -> float | None:
        """The held-out loss of a combination; None where it was not measured."""
        wanted = (model, ratio, adapter)
        return next((s.loss for s in self.scores if (s.model, s.ratio, s.adapter) == wanted), None)


def demo(
    *,
    output: Path,
    base: str | None = None,
    data: Path | None = None,
    ratios: Sequence[float] = RATIOS,
    steps: int = 80,
    learning_rate: float | None = None,
    upper_bound: bool = True,
    refinement: int = 8,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> DemoResult:
    """Calibrate, build an emulator per ratio, train, correct and evaluate, and write all files to `output`.

    Without `base` it is the small model shipped with the package and its data. `data` is JSONL of the user's task, of
    which a tenth is held out. `upper_bound` also trains a LoRA on the base itself, which needs memory for all of it.
    The LoRA of the smallest emulator is refined by `refinement` steps on the base, if any. Raises `InputError` for
    unusable options, and `EmlocError` with the message of a stage that failed.
    """
    require_apart(output, [Path(path) for path in (base, data) if path is not None])
    check_output(output, overwrite=overwrite)
    if (base is None) != (data is None):
        raise InputError("--base and --data go together: give both, or neither for the model and data that are shipped")
    if len(set(ratios)) != len(ratios) or not ratios:
        raise InputError("give one or several different ratios")
    settings = dict(OWN_MODEL if base is None else USER_MODEL)
    if learning_rate is not None:
        settings["learning_rate"] = learning_rate
    started = time.monotonic()
    with new_folder(output, overwrite=overwrite) as folder:
        name = _prepare(folder, base, data)
        work = _Work(folder, name, settings, steps, trust_remote_code, progress)
        scores, trainings = work.run(sorted(ratios, reverse=True), upper_bound, refinement)
        result = DemoResult(output, name, scores, trainings, work.commands, time.monotonic() - started)
        note = "# Every command of this run, in order. They run in this folder, once what they wrote is moved away."
        write_text(folder / "commands.sh", "\n".join([note, *work.commands]) + "\n")
        write_json(folder / "results.json", {**asdict(result), "output": str(output)})
    return result


class _Work:
    """Runs the commands inside the folder, with paths relative to it, so that the finished folder can be moved."""

    def __init__(
        self,
        folder: Path,
        base: str,
        settings: dict[str, Any],
        steps: int,
        trust_remote_code: bool,
        progress: Progress,
    ) -> None:
        self._folder, self._base, self._steps, self._progress = folder, base, steps, progress
        self._settings, self._trust = settings, ["--trust-remote-code"] if trust_remote_code else []
        self.commands: list[str] = []

    def run(self, ratios: Sequence[float], upper_bound: bool, refinement: int) -> tuple[list[Score], list[Training]]:
        """All stages; the scores in the order of the table, and the trainings."""
        base = ["--base", self._base, *self._trust]
        precision = ["--dtype", str(self._settings["dtype"])]
        length = ["--max-length", str(LENGTH)]
        trainings: list[Training] = []
        upper = []
        if upper_bound:
            trainings.append(self._train(None, self._base, "lora-on-base"))
            upper = ["--adapter", "lora-on-base"]
        data = ["--data", "data/train.jsonl", *length]
        self._stage("calibrate", "calibrate", *base, *data, *precision, "--gradients", "--output", "calibration")
        transferred: list[str] = []
        for ratio in ratios:
            emulator, lora, corrected = (f"{kind}-{ratio:g}" for kind in ("emulator", "lora", "corrected"))
            size = ["--ratio", f"{ratio:g}", "--output", emulator]
            self._stage(f"build {ratio:g}", "build-emulator", *base, "--calibration", "calibration", *size)
            trainings.append(self._train(ratio, emulator, lora, "--trust-remote-code"))
            pair = ["--emulator", emulator, "--adapter", lora]
            self._stage(f"correct {ratio:g}", "correct", *pair, *base, "--output", corrected)
            transferred += ["--adapter", lora, "--adapter", corrected]
        if refinement:
            before, refined = f"corrected-{ratios[-1]:g}", f"refined-{ratios[-1]:g}"
            steps = ["--steps", str(refinement), "--batch-size", str(BATCH), *precision]
            self._stage(
                f"refine {ratios[-1]:g}", "refine", *base, "--adapter", before, *data, *steps, "--output", refined
            )
            transferred += ["--adapter", refined]
        held_out = ["--data", "data/heldout.jsonl", *length, *precision]
        scores = self._evaluate("evaluate base", *base, *upper, *transferred, *held_out)
        for ratio in ratios:
            pair = ["--emulator", f"emulator-{ratio:g}", "--adapter", f"lora-{ratio:g}"]
            scores += self._evaluate(f"evaluate {ratio:g}", *pair, *held_out, ratio=ratio)
        return scores, trainings

    def _train(self, ratio: float | None, model: str, output: str, *options: str) -> Training:
        title = "train base" if ratio is None else f"train {ratio:g}"
        rate = f"{self._settings['learning_rate']:g}"
        settings = ["--steps", str(self._steps), "--learning-rate", rate, "--dtype", str(self._settings["dtype"])]
        trust = sorted({*options, *self._trust})
        files = ["--model", model, "--data", "data/train.jsonl", "--output", output]
        self._execute(
            title, [sys.executable, TRAINER, *files, *settings, "--max-length", str(LENGTH), *trust], "python"
        )
        figures = json.loads((self._folder / output / "training.json").read_text(encoding="utf-8"))
        return Training(
            ratio=ratio,
            seconds=figures["seconds"],
            peak_bytes=figures["peak_bytes"],
            idle_bytes=figures["idle_bytes"],
            parameters=figures["model_parameters"],
            parameter_bytes=figures["model_parameter_bytes"],
            first_loss=figures["first_loss"],
            last_loss=figures["last_loss"],
        )

    def _evaluate(self, title: str, *arguments: str, ratio: float | None = None) -> list[Score]:
        return [self._score(record, ratio) for record in self._stage(title, "evaluate", *arguments)["results"]]

    def _score(self, record: dict[str, Any], ratio: float | None) -> Score:
        adapter = "none"
        if record["adapter"] is not None:
            kind, _, suffix = record["adapter"].rpartition("-")
            adapter = {"lora-on": "trained on the base", "lora": "uncorrected"}.get(kind, kind)
            ratio = None if kind == "lora-on" else float(suffix)
        figures = {key: record[key] for key in ("loss", "perplexity", "accuracy")}
        return Score(record["model"], ratio, adapter, **figures)

    def _stage(self, title: str, *arguments: str) -> Any:
        """Run one of our commands and return what it prints with --json."""
        line = [sys.executable, "-m", "emloc_tools", *arguments]
        return json.loads(self._execute(title, [*line, "--json"], "emloc-tools", shown=line[2:]))

    def _execute(self, title: str, line: list[str], program: str, shown: list[str] | None = None) -> str:
        self.commands.append(shlex.join([program, *(shown or line)[1:]]))
        self._progress(Step(title, 0, 1))
        started = time.monotonic()
        done = subprocess.run(line, cwd=self._folder, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise EmlocError(f"{title} failed: {last.removeprefix('Error: ')} (command: {self.commands[-1]})")
        self._progress(Step(title, 1, 1, f"{time.monotonic() - started:.0f} s"))
        return done.stdout


def _prepare(folder: Path, base: str | None, data: Path | None) -> str:
    """Put the trainer, the data and the shipped base into the folder; returns what the commands call the base."""
    shipped = importlib.resources.files("emloc_tools.demo")
    with importlib.resources.as_file(shipped) as assets:
        shutil.copyfile(assets / TRAINER, folder / TRAINER)
        if base is None:
            shutil.copytree(assets / "base", folder / "base")
            shutil.copytree(assets / "data", folder / "data")
            return "base"
    assert data is not None  # goes with a base
    _split(data, folder / "data")
    path = Path(os.path.expanduser(base))  # noqa: PTH111 - Path.expanduser raises where there is no such home
    return str(path.resolve()) if path.exists() else base


def _split(data: Path, folder: Path) -> None:
    """Hold out one line in ten of a JSONL file, always the same ones."""
    if not data.is_file() or data.suffix == ".safetensors":
        raise InputError(f"{data}: the demo needs JSONL with text, messages, or prompt and completion")
    try:
        lines = [line for line in data.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{data}: not UTF-8: {error.reason} at byte {error.start}") from error
    if len(lines) < FEWEST_LINES:
        raise InputError(f"{data} holds {len(lines)} samples; the demo needs {FEWEST_LINES} or more to hold some out")
    held_out = set(random.Random(0).sample(range(len(lines)), len(lines) // HELD_OUT_PART))
    folder.mkdir()
    for name, chosen in (
        ("train", [line for index, line in enumerate(lines) if index not in held_out]),
        ("heldout", [lines[index] for index in sorted(held_out)]),
    ):
        write_text(folder / f"{name}.jsonl", "\n".join(chosen) + "\n")
