"""A Hub for each test, and one process that talks to it as a shell would start the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Printed
from tests.hub.hub_server import OWNER, Hub, serve

ROOT = Path(__file__).parents[2]
# huggingface_hub reads HF_ENDPOINT when it is imported, and waits between its attempts to reach a failing Hub.
PROGRAM = """
import json, os, sys, time
from click.testing import CliRunner
from emloc_tools.cli import main

time.sleep = lambda seconds: None
for line in sys.stdin:
    asked = json.loads(line)
    os.chdir(asked["folder"])
    os.environ.pop("HF_TOKEN", None)
    if asked["token"]:
        os.environ["HF_TOKEN"] = asked["token"]
    done = CliRunner().invoke(main, asked["words"], prog_name="emloc-tools")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    print(json.dumps([done.exit_code, done.stdout, done.stderr]), flush=True)
"""


class Shell:
    """Runs `emloc-tools` in a process whose HF_ENDPOINT is the Hub."""

    def __init__(self, home: Path, hub: Hub) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        self.hub, self.folder = hub, home
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(self, *words: object, token: str | None = OWNER) -> Printed:
        """Run a command in the test's folder, with a token or without. No token may ever be printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"words": [str(word) for word in words], "token": token, "folder": str(self.folder)}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._process.communicate()[1]
        assert "hf_TheToken" not in line
        assert "X-Amz" not in line
        return Printed(*json.loads(line))

    def json(self, *words: object) -> Any:
        """What a command that succeeds prints with --json."""
        printed = self(*words, "--json", "--quiet")
        assert (printed.status, printed.stderr) == (0, ""), printed
        return json.loads(printed.stdout)

    def stop(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


@pytest.fixture(scope="session")
def _shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with serve(Hub()) as hub:
        shell = Shell(tmp_path_factory.mktemp("hub-home"), hub)
        yield shell
        shell.stop()


@pytest.fixture
def hub(_shell: Shell) -> Hub:
    """An empty Hub without any failure."""
    empty = Hub(url=_shell.hub.url)
    vars(_shell.hub).update(vars(empty))
    return _shell.hub


@pytest.fixture
def shell(_shell: Shell, hub: Hub, tmp_path: Path) -> Shell:
    """Commands in an empty folder, and the Hub that they reach."""
    _shell.folder = tmp_path
    return _shell


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their names in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
