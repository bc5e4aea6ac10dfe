"""Shell completion, as docs/cli.md describes it: the variable and the names that it gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emloc_tools.cli import main

PROGRAM = "import sys; from emloc_tools.cli import main; sys.argv[0] = 'emloc-tools'; main(prog_name='emloc-tools')"
PAGE = Path(__file__).parent.parent.parent / "docs" / "cli.md"


def completed(shell: str, **environment: str) -> str:
    """What the program answers to a shell."""
    variables = {**os.environ, "_EMLOC_TOOLS_COMPLETE": shell, **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("emloc-tools merge", {"merge", "merge-calibration"}),
        ("emloc-tools inspect --tr", {"--trust-remote-code"}),
        ("emloc-tools build-emulator --allocation ", {"uniform", "adaptive"}),
    ],
)
def test_names_options_and_choices_are_completed(words: str, expected: set[str]) -> None:
    last = len(words.split(" ")) - 1
    answer = completed("bash_complete", COMP_WORDS=words, COMP_CWORD=str(last))
    assert {line.partition(",")[2] for line in answer.splitlines()} == expected
    if last == 1:
        assert expected < set(main.commands)


def test_the_lines_of_the_page_make_a_script_for_each_shell() -> None:
    shells = re.findall(r"_EMLOC_TOOLS_COMPLETE=(\w+)_source emloc-tools", PAGE.read_text(encoding="utf-8"))
    assert shells == ["bash", "zsh", "fish"]
    for shell in shells:
        if shell != "bash":  # of bash, click asks its version, which has to be installed
            assert f"_EMLOC_TOOLS_COMPLETE={shell}_complete" in completed(f"{shell}_source")
