"""docs/hub.md is true: its commands run, against a Hub on this machine."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from tests.conftest import Run
from tests.docs.page_lines import lines
from tests.docs.test_docs import ROOT
from tests.hub.conftest import Shell, contents
from tests.hub.hub_server import Hub

PAGE = ROOT / "docs" / "hub.md"


def test_the_commands_of_the_page_run(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(run.emulator, tmp_path / "emulator")
    # What the last command fetches was pushed some time before.
    shell.json("push", run.corrected, "--repo", "org/my-lora", "--revision", "v2")
    for line in lines(PAGE):
        program, *words = shlex.split(line)
        assert program == "emloc-tools"
        printed = shell(*words)
        assert printed.status == 0, printed.stderr
    pulled, pushed = contents(tmp_path / "emulator-from-hub"), contents(tmp_path / "emulator")
    assert {**pulled, "README.md": b""} == {**pushed, "README.md": b""}
    assert contents(tmp_path / "my-lora") == contents(run.corrected)
