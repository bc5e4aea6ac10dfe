"""Environments such as trainers have: transformers and PEFT, one of them TRL, but nothing of emloc-tools.

    python -m tests.external.environments

creates `.venv-trainer-old`, `-new` and `-trl` in the repository's root, or makes them anew when something that
they were made from changed. Each is a virtual environment with the releases of `constraints-<name>.txt` in it. torch,
which may take gigabytes, is not installed again: it and its own dependencies are links to the running environment.

    python -m tests.external.environments --released

also creates one for each of the trainers that ask for releases of their own, as pip resolves them, each with a torch of
its own: some 6 GB each. `make test-trainers` runs those that are there.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMES = ("old", "new")  # two generations of transformers
TRAINERS = "trl"  # for the runs of trainers; transformers' own and accelerate come with it
# Of each its release, and what its run needs beside that.
RELEASED = {
    "axolotl": ("axolotl==0.19.0",),
    "llamafactory": ("llamafactory==0.9.5", "bitsandbytes==0.50.2"),
    "ms-swift": ("ms-swift==4.6.0", "bitsandbytes==0.50.2"),
    "unsloth": ("unsloth==2026.10.9",),
    "diffusers": ("diffusers==0.42.1", "transformers==5.24.0", "accelerate==1.15.0", "peft==0.21.2", "tensorboard"),
}
TORCH = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0")  # of one build, or torchvision does not load
REMEDY = "run `python -m tests.external.environments`"


@dataclass(frozen=True)
class Environment:
    """One of the environments, whether it exists or not."""

    name: str

    @property
    def folder(self) -> Path:
        """Where it is."""
        return ROOT / f".venv-trainer-{self.name}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def constraints(self) -> Path:
        """The releases in it, every one of them pinned."""
        return HERE / f"constraints-{self.name}.txt"

    @property
    def stamp(self) -> Path:
        """Written last: what the environment was made from."""
        return self.folder / "made-from.json"

    def made_from(self) -> dict[str, Any]:
        """All that decides what is in it."""
        torch = importlib.metadata.distribution("torch")
        return {
            "constraints": self.constraints.read_text(encoding="utf-8"),
            "python": f"{sys.base_prefix} {platform.python_version()}",
            "torch": f"{torch.locate_file('')} {torch.version}",
        }

    def is_current(self) -> bool:
        """Whether it was made to the end, from what is there now."""
        return self.stamp.is_file() and json.loads(self.stamp.read_text(encoding="utf-8")) == self.made_from()

    def create(self) -> None:
        """Make it, in place of what is there. An interrupted run leaves no stamp, so the next one starts anew."""
        shutil.rmtree(self.folder, ignore_errors=True)  # removes links, not what they lead to
        venv.create(self.folder, symlinks=True)
        (packages,) = self.folder.glob("lib/python*/site-packages")
        for distribution in with_dependencies("torch"):
            link(distribution, packages)
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "-r", str(self.constraints)], check=True)
        subprocess.run([*pip, "check"], check=True, stdout=subprocess.DEVNULL)
        self.stamp.write_text(json.dumps(self.made_from(), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Released(Environment):
    """An environment of one trainer's release and whatever that asks for."""

    def made_from(self) -> dict[str, Any]:
        """All that decides what is in it."""
        return {"python": platform.python_version(), "requirements": [*TORCH, *RELEASED[self.name]]}

    def create(self) -> None:
        """Make it, in place of what is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        venv.create(self.folder, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        # Three equal signs: not a build for CPUs alone, with which torchvision as it is released does not load.
        torch = [requirement.replace("==", "===") for requirement in TORCH]
        subprocess.run([*pip, "install", "--quiet", *torch, *RELEASED[self.name]], check=True)
        self.stamp.write_text(json.dumps(self.made_from(), indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Make the environments that are missing or stale."""
    environments = [*map(Environment, (*NAMES, TRAINERS))]
    if "--released" in arguments:
        environments += map(Released, RELEASED)
    for environment in environments:
        if not environment.is_current():
            print(f"making {environment.folder.name}", flush=True)
            environment.create()


def with_dependencies(name: str) -> list[importlib.metadata.Distribution]:
    """An installed distribution and everything that it needs on this platform."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending, seen = {(name, "")}, set()
    while pending:
        seen.add(pair := pending.pop())
        name, extra = pair
        found[name] = importlib.metadata.distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending |= {(requirement.name, extra) for extra in ("", *requirement.extras)} - seen
    return list(found.values())


def link(distribution: importlib.metadata.Distribution, packages: Path) -> None:
    """Link a distribution's modules and metadata into a folder of packages; two of them may share a namespace."""
    for name in sorted({file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}):
        if not (packages / name).is_symlink():
            (packages / name).symlink_to(Path(str(distribution.locate_file(name))))


if __name__ == "__main__":
    main(sys.argv[1:])
