"""Runs of trainers on an emulator, by the files that `trainer-config` writes and nothing else of emloc-tools."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emloc_tools.stages.trainer_config import Trainer, trainer_config
from tests import pico
from tests.external.environments import TRAINERS, Environment
from tests.external.workshop import Case

STEPS = 8
SECONDS = 150  # a run takes some ten; processes that wait for each other must not wait for ever
LOSS = re.compile(r"(?:'loss': '?|: loss )(\d+\.\d+)")
REFUSED = re.compile("ignore_mismatched_sizes|size mismatch")  # what transformers says of the guard
TRUST = {".yaml": ("trust_remote_code: true", "trust_remote_code: false")}
TRUST[".py"] = ("TRUST_REMOTE_CODE = True", "TRUST_REMOTE_CODE = False")
DATA = {
    "text": [{"text": f"Numbers such as {n} and {n + 1} follow each other."} for n in range(16)],
    "prompt": [{"prompt": f"After {n} comes", "completion": f" {n + 1}."} for n in range(16)],
    "messages": [
        {"messages": [{"role": "user", "content": f"After {n}?"}, {"role": "assistant", "content": f"{n + 1}."}]}
        for n in range(16)
    ],
}


@dataclass(frozen=True)
class Way:
    """A trainer, how it is started on its file, and the kind of data that it gets."""

    trainer: Trainer
    command: tuple[str, ...]
    data: str
    suffix: str = ".yaml"
    programs: Path = Environment(TRAINERS).folder / "bin"
    can_refuse: bool = True  # ms-swift runs a model's code in any case


LAUNCH = ("accelerate", "launch", "--num_processes", "2")
WAYS = {
    "transformers": Way("transformers", ("python", "-I"), "prompt", ".py"),
    "trl": Way("trl", ("trl", "sft", "--config"), "text"),
    "ddp": Way("accelerate", (*LAUNCH, "--multi_gpu"), "messages", ".py"),
}
FSDP = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
SLOW_WAYS = {"fsdp2": Way("accelerate", (*LAUNCH, *FSDP), "messages", ".py")}
# Each needs an environment of its own, with the dependencies that its release asks for.
OTHER_WAYS = {
    "axolotl": Way("axolotl", ("axolotl", "train"), "messages"),
    "llamafactory": Way("llamafactory", ("llamafactory-cli", "train"), "messages"),
    "ms-swift": Way("ms-swift", ("swift", "sft"), "messages", can_refuse=False),
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended, all that it printed, and the folder where the LoRA is if it wrote one."""

    status: int
    log: str
    adapter: Path

    @property
    def losses(self) -> list[float]:
        """The printed losses, step by step."""
        return [float(loss) for loss in LOSS.findall(self.log)]


def train_all(case: Case, root: Path, ways: Mapping[str, Way], *, trust: bool) -> dict[str, Outcome]:
    """Train in every way, two at a time; without `trust`, by the same files with that one word turned."""
    outcomes: dict[str, Outcome] = {}
    names = list(ways)
    for pair in (names[start : start + 2] for start in range(0, len(names), 2)):
        outcomes |= _train({name: _write(case, root / name, ways[name], trust=trust) for name in pair}, root, ways)
    return outcomes


def _write(case: Case, folder: Path, way: Way, *, trust: bool) -> Path:
    folder.mkdir(parents=True)
    data = pico.write_jsonl(folder / "train.jsonl", DATA[way.data])
    path = folder / f"config{way.suffix}"
    small = {"steps": STEPS, "batch_size": 4, "accumulation": 1, "learning_rate": 1e-2, "max_length": 64}
    trainer_config(trainer=way.trainer, emulator=case.emulator, data=data, output=path, lora=folder / "lora", **small)
    if not trust:
        assert way.can_refuse
        text, (trusting, untrusting) = path.read_text(encoding="utf-8"), TRUST[way.suffix]
        assert text.count(trusting) == 1
        path.write_text(text.replace(trusting, untrusting), encoding="utf-8")
    return path


def _train(files: Mapping[str, Path], root: Path, ways: Mapping[str, Way]) -> dict[str, Outcome]:
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HOME": str(root)}
    variables["AXOLOTL_DO_NOT_TRACK"] = "1"
    running: dict[str, subprocess.Popen[bytes]] = {}
    outcomes = {}
    try:
        for name, path in files.items():
            programs, (program, *options) = ways[name].programs, ways[name].command
            with path.with_suffix(".log").open("wb") as log:
                running[name] = subprocess.Popen(
                    [str(programs / program), *options, str(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=path.parent,
                    env={
                        **variables,
                        "PATH": f"{programs}:{os.environ['PATH']}",
                        "HF_HOME": str(path.parent / "hf"),
                    },
                    start_new_session=True,  # a launcher starts processes of its own
                )
        for name, path in files.items():
            status = running[name].wait(SECONDS)
            log_text = path.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            written = sorted((path.parent / "lora").rglob("adapter_model.safetensors"))  # ms-swift adds a folder
            outcomes[name] = Outcome(status, log_text, written[-1].parent if written else path.parent / "lora")
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    return outcomes
