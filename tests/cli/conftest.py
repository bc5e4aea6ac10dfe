"""Commands run in this process, as a shell would run them, and what they print."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from emloc_tools.cli import main


@dataclass(frozen=True)
class Printed:
    """Exit status and outputs of a command."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The message of a command that failed: its one line that begins with `Error:`."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.stderr
        return lines[0]


Invoke = Callable[..., Printed]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `emloc-tools` with arguments in an empty folder. An exception that would print a traceback is raised here."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, columns: int = 80) -> Printed:
        words = [str(argument) for argument in arguments]
        result = CliRunner(env={"COLUMNS": str(columns)}).invoke(main, words, prog_name="emloc-tools")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Printed(result.exit_code, result.stdout, result.stderr)

    return run


UNREADABLE = re.compile(r"Traceback|\w+Path\(|<class|object at 0x|\bErrno\b|tensor\(|torch\.Size|\bNone\b|\\n")
