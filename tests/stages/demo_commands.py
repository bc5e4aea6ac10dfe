"""The commands that a demo would run, without running any."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emloc_tools.stages import demo as stage

FIGURES = {
    "seconds": 2.5,
    "peak_bytes": 70,
    "idle_bytes": 60,
    "model_parameters": 50,
    "model_parameter_bytes": 40,
    "first_loss": 3.5,
    "last_loss": 1.5,
}


class Commands:
    """Stands in for the processes: keeps their command lines, and answers as the programs would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: str | None = None, stderr: str = "") -> None:
        self.lines: list[list[str]] = []
        self._fail, self._stderr = fail, stderr
        monkeypatch.setattr(stage.subprocess, "run", self)

    def __call__(self, line: list[str], *, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        assert line[0] == sys.executable
        self.lines.append(line[1:])
        if self._fail in line:
            return subprocess.CompletedProcess(line, 1, "", self._stderr)
        if line[1] == "train_lora.py":
            output = cwd / line[line.index("--output") + 1]
            output.mkdir()
            (output / "training.json").write_text(json.dumps(FIGURES))
            return subprocess.CompletedProcess(line, 0, "trained", "")
        return subprocess.CompletedProcess(line, 0, json.dumps({"results": _results(line)}), "")


def _results(line: list[str]) -> list[dict[str, Any]]:
    """One for the model alone and one for every --adapter, with figures that tell them apart."""
    adapters = [None, *(value for option, value in itertools.pairwise(line) if option == "--adapter")]
    model = "base" if "--base" in line else "emulator"
    return [
        {"model": model, "adapter": name, "loss": number, "perplexity": 10 + number, "accuracy": 20 + number}
        for number, name in enumerate(adapters)
    ]


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
