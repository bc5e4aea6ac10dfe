"""Runs of trainers on an emulator, by the files that `trainer-config` writes and nothing else of emloc-tools."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from emloc_tools.cli import main
from tests import pico
from tests.external.environments import TRAINERS, Environment
from tests.external.workshop import Case

STEPS = 8
SECONDS = 150  # a run takes some ten; processes that wait for each other must not wait for ever
LOSS = re.compile(r"(?:'loss': '?|: loss |\bloss=)(\d+\.\d+)")
REFUSED = re.compile("ignore_mismatched_sizes|size mismatch")  # what transformers says of the guard
# In 4 bits it does not look at shapes. Early releases of transformers 5 cannot quantise the guard; with later ones no
# layer has the weight that PEFT asks for.
REFUSED_IN_FOUR_BITS = re.compile(
    "RuntimeError: We encountered some issues during automatic conversion of the weights"
    "|AttributeError: 'Parameter' object has no attribute '[a-z_]+'"
)
TRUST = {".yaml": ("trust_remote_code: true", "trust_remote_code: false")}
TRUST[".py"] = ("TRUST_REMOTE_CODE = True", "TRUST_REMOTE_CODE = False")
SMALL = ("--steps", f"{STEPS}", "--batch-size", "4", "--accumulation", "1", "--learning-rate", "1e-2")
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

    trainer: str
    command: tuple[str, ...]
    data: str
    suffix: str = ".yaml"
    programs: Path = Environment(TRAINERS).folder / "bin"
    can_refuse: bool = True  # ms-swift runs a model's code in any case
    four_bits: bool = False

    @property
    def refusal(self) -> re.Pattern[str]:
        """What a run without trust must print."""
        return REFUSED_IN_FOUR_BITS if self.four_bits else REFUSED

    @property
    def written_by(self) -> list[str]:
        """The command that writes its file, in a folder with `emulator` and `train.jsonl`."""
        files = ("--emulator", "emulator", "--data", "train.jsonl", "--output", f"train{self.suffix}")
        bits = ("--four-bits",) if self.four_bits else ()
        return ["trainer-config", "--trainer", self.trainer, *files, *SMALL, "--max-length", "64", *bits]


LAUNCH = ("accelerate", "launch", "--num_processes", "2")
FSDP = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
TRL, DDP = ("trl", "sft", "--config"), (*LAUNCH, "--multi_gpu")
WAYS = {
    "transformers": Way("transformers", ("python", "-I"), "prompt", ".py"),
    "trl": Way("trl", TRL, "text"),
    "ddp": Way("accelerate", DDP, "messages", ".py"),
    "trl, 4 bits": Way("trl", TRL, "text", four_bits=True),
}
SLOW_WAYS = {
    "fsdp2": Way("accelerate", (*LAUNCH, *FSDP), "messages", ".py"),
    "transformers, 4 bits": Way("transformers", ("python", "-I"), "prompt", ".py", four_bits=True),
    "ddp, 4 bits": Way("accelerate", DDP, "messages", ".py", four_bits=True),
}
# Each needs an environment of its own, with the dependencies that its release asks for.
OTHER_WAYS = {
    "axolotl": Way("axolotl", ("axolotl", "train"), "messages"),
    "axolotl, 4 bits": Way("axolotl", ("axolotl", "train"), "messages", four_bits=True),
    "llamafactory": Way("llamafactory", ("llamafactory-cli", "train"), "messages"),
    "llamafactory, 4 bits": Way("llamafactory", ("llamafactory-cli", "train"), "messages", four_bits=True),
    "unsloth": Way("unsloth", ("python", "-I"), "text", ".py"),
    "unsloth, 4 bits": Way("unsloth", ("python", "-I"), "text", ".py", four_bits=True),
    "ms-swift": Way("ms-swift", ("swift", "sft"), "messages", can_refuse=False),
    "ms-swift, 4 bits": Way("ms-swift", ("swift", "sft"), "messages", can_refuse=False, four_bits=True),
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
        files = {name: _write(case, root / name, ways[name], trust=trust) for name in pair}
        commands = {
            name: ([str(ways[name].programs / ways[name].command[0]), *ways[name].command[1:], path.name], path.parent)
            for name, path in files.items()
        }
        outcomes |= run_beside(commands, {name: ways[name].programs for name in pair})
    return outcomes


def _write(case: Case, folder: Path, way: Way, *, trust: bool) -> Path:
    folder.mkdir(parents=True)
    for name, target in (("emulator", case.emulator), ("base", case.base)):
        (folder / name).symlink_to(target)
    pico.write_jsonl(folder / "train.jsonl", DATA[way.data])
    emloc_tools(way.written_by, folder)
    path = folder / f"train{way.suffix}"
    if not trust:
        assert way.can_refuse
        text, (trusting, untrusting) = path.read_text(encoding="utf-8"), TRUST[way.suffix]
        assert text.count(trusting) == 1
        path.write_text(text.replace(trusting, untrusting), encoding="utf-8")
    return path


def emloc_tools(arguments: list[str], folder: Path) -> str:
    """Run a command of ours in a folder, and return the line that a user would type."""
    with working_in(folder):
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return shlex.join(["emloc-tools", *arguments])


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Paths are relative to a folder for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_beside(commands: Mapping[str, tuple[list[str], Path]], programs: Mapping[str, Path]) -> dict[str, Outcome]:
    """Run commands at the same time, each in its folder, with nothing of the tests' environment in theirs."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    outcomes = {}
    try:
        for name, (command, folder) in commands.items():
            variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            variables |= {"HOME": str(folder.parent), "HF_HOME": str(folder / "hf"), "AXOLOTL_DO_NOT_TRACK": "1"}
            variables["UNSLOTH_DISABLE_STATISTICS"] = "1"
            variables["PATH"] = f"{programs[name]}:{os.environ['PATH']}"
            with (folder / "log.txt").open("wb") as log:
                running[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env=variables,
                    start_new_session=True,  # a launcher starts processes of its own
                )
        for name, (_, folder) in commands.items():
            status = running[name].wait(SECONDS)
            text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
            written = sorted((folder / "lora").rglob("*.safetensors"))  # ms-swift adds a folder
            outcomes[name] = Outcome(status, text, written[-1].parent if written else folder / "lora")
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    return outcomes
