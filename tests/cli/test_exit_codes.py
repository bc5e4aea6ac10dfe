"""Exit statuses of real processes, and what an interrupted one leaves behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Run

# The command as it is, but for a pause after its first progress line in which the signal arrives.
PAUSING = """
import time
from emloc_tools.cli import console, main

lines = console.in_tenths

def pausing(where):
    show = lines(where)
    def step(done):
        show(done)
        if 10 * done.done >= done.total:  # a line was shown
            time.sleep(60)
    return step

console.in_tenths = pausing
main()
"""


def execute(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder."""
    command = [sys.executable, "-m", "emloc_tools", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_0_for_success_and_the_command_line_is_recorded(run: Run, tmp_path: Path) -> None:
    finished = execute(
        tmp_path, "build-emulator", "--base", run.base, "--ratio", "0.5", "--output", "my emulator", "--quiet"
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    recorded = (tmp_path / "my emulator" / "emulator.json").read_text()
    assert f"emloc-tools build-emulator --base {run.base} --ratio 0.5 --output 'my emulator' --quiet" in recorded


def test_1_for_an_expected_error(tmp_path: Path) -> None:
    finished = execute(tmp_path, "inspect", "nowhere")
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.startswith("Error: nowhere does not exist")
    assert finished.stderr.count("\n") == 1


def test_2_for_a_usage_error(tmp_path: Path) -> None:
    finished = execute(tmp_path, "calibrate", "--base", "model")
    assert finished.returncode == 2
    assert "Usage:" in finished.stderr
    assert "Missing option '--data'" in finished.stderr


@pytest.mark.parametrize(
    ("stage", "stopped_by", "status", "word"),
    [
        ("calibrate", signal.SIGINT, 130, "interrupted"),
        ("build-emulator", signal.SIGINT, 130, "interrupted"),
        ("build-emulator", signal.SIGTERM, 143, "terminated"),
    ],
)
def test_130_for_ctrl_c_and_143_for_sigterm_and_nothing_is_left(
    run: Run, tmp_path: Path, stage: str, stopped_by: signal.Signals, status: int, word: str
) -> None:
    options = {"calibrate": ["--data", run.data], "build-emulator": ["--ratio", "0.5"]}[stage]
    command = [sys.executable, "-c", PAUSING, stage, "--base", run.base, *options, "--output", "out"]
    with subprocess.Popen(map(str, command), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert " of " in first
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"], "it must be at work when the signal comes"
        process.send_signal(stopped_by)
        rest = process.stderr.read()
    assert process.returncode == status
    assert rest == f"Error: {word}; nothing was left under the final name\n"
    assert list(tmp_path.iterdir()) == []
