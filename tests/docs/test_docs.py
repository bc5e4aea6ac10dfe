"""The documentation is true: generated parts are current, commands and options exist, links lead somewhere, and the
tutorial runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from docs import generate
from emloc_tools.cli import main as group

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "formats").rglob("*.md")])
PAGES = [page for page in PAGES if "golden" not in page.parts]


# The tutorial's settings are for people; a test has no time for as many samples.
SMALLER = {"--steps 20": "--steps 6", "--samples 64": "--samples 8", "--samples 32": "--samples 8"} | {
    f"{name}256": f"{name}64" for name in ("--max-length ", "max_length=")
}


def smaller(text: str) -> str:
    """The tutorial's lines with the smaller settings."""
    for usual, small in SMALLER.items():
        text = text.replace(usual, small)
    return text


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[list[str]]:
    """Every `emloc-tools COMMAND …` in a page's bash blocks and inline code, as words."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip().startswith("emloc-tools ")]
    lines += re.findall(r"`(emloc-tools [^`\n]+)`", page.read_text(encoding="utf-8"))
    return [shlex.split(line.replace("…", ""), comments=True) for line in lines]


def unknown(words: list[str]) -> str | None:
    """What of a command line does not exist."""
    command = group.commands.get(words[1])
    if command is None:
        return None if words[1].startswith("-") or words[1] == "COMMAND" else f"command {words[1]}"
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    return next(
        (f"option {word} of {words[1]}" for word in words[2:] if word.startswith("--") and word not in known), None
    )


@pytest.mark.parametrize(("path", "text"), generate.pages().items(), ids=lambda value: getattr(value, "name", ""))
def test_generated_text_is_current(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_commands_and_options_exist(page: Path) -> None:
    assert [unknown(words) for words in command_lines(page) if unknown(words)] == []


def test_a_misspelt_option_is_found() -> None:
    """The control."""
    assert unknown(shlex.split("emloc-tools calibrate --base b --sample 3")) == "option --sample of calibrate"
    assert unknown(shlex.split("emloc-tools calibrat --base b")) == "command calibrat"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


def test_every_command_is_in_the_tutorial_or_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    missing = [name for name in group.commands if not re.search(rf"emloc-tools {name}(?![\w-])", text)]
    assert [name for name in missing if name != "demo"] == []
    assert all(isinstance(command, click.Command) for command in group.commands.values())


def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Its lines after the set-up, in order, and then its Python and that of the Python page, in one folder."""
    demo = ROOT / "emloc_tools" / "demo"
    shutil.copytree(demo / "base", tmp_path / "base")
    shutil.copytree(demo / "data", tmp_path / "data")
    shutil.copyfile(demo / "train_lora.py", tmp_path / "train_lora.py")
    bash = blocks(ROOT / "docs/tutorial.md", "bash")[1:]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = "set -e\n" + smaller("\n".join(bash))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = done.stdout.partition("token accuracy")[2]
    assert re.search(r"^base +corrected +\d+\.\d+", table, re.MULTILINE), done.stdout
    shutil.rmtree(tmp_path / "calibration")
    shutil.rmtree(tmp_path / "emulator")
    tutorial = blocks(ROOT / "docs/tutorial.md", "python")
    first, second = blocks(ROOT / "docs/python.md", "python")
    program = smaller("\n".join([*tutorial, first, "import shutil; shutil.rmtree('corrected')", second]))
    assert all(usual in "".join([*bash, first, second]) for usual in SMALLER)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^corrected \d+\.\d+ \d+\.\d+$", done.stdout, re.MULTILINE)
