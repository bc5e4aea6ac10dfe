"""Every command in the pages' blocks of bash runs, page by page, on a tiny model in place of the one that is named."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner

from emloc_tools.cli import main
from tests import pico
from tests.conftest import Run
from tests.docs import page_lines
from tests.docs.page_lines import BY_OTHERS, HERE, NOT_RUN, TRAINERS, lines, name_of, unaccounted
from tests.docs.test_docs import PAGES, ROOT, blocks
from tests.stages.classifiers import save_labelled

HUB_ID = re.compile(r"(?:Qwen|meta-llama)/[\w.\-]+|BASE")
# A tiny model reads few and short samples, and needs little memory. Options that a line gives itself are kept, but for
# those of the plan, which would fit without any emulator.
FEW = {"--samples": "4", "--max-length": "32", "--device": "cpu"}
SMALLER: dict[str, dict[str, str]] = {
    "calibrate": FEW,
    "evaluate": FEW,
    "refine": {"--steps": "1", "--samples-per-step": "2", "--max-length": "32", "--device": "cpu"},
    "fit-head": {"--device": "cpu"},
}
OF_PLAN = {"--memory": "500KiB", "--sequence-length": "8", "--dtype": "float32"}


def smaller(line: str) -> tuple[list[str], str | None]:
    """The words of a command for the tiny model, and the file to which its output goes."""
    command, _, file = line.partition(" > ")
    words = [HUB_ID.sub("base", word) for word in shlex.split(command, comments=True)][1:]
    if words[0] == "plan":
        for option, value in OF_PLAN.items():
            if option in words:
                words[words.index(option) + 1] = value
            else:
                words += [option, value]
    for option, value in SMALLER.get(words[0], {}).items():
        words += [] if option in words else [option, value]
    options = {name for parameter in main.commands[words[0]].params for name in parameter.opts}
    return [*words, *(["--overwrite"] if "--overwrite" in options else [])], file.strip() or None


def execute(line: str) -> str:
    """Run a line of emloc-tools in this folder, as a shell would, and return what it prints."""
    words, file = smaller(line)
    done = CliRunner().invoke(main, words, prog_name="emloc-tools")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"{line}\n{words}\n{done.stderr}"
    if file is not None:
        Path(file).write_text(done.stdout)
    return done.stdout


def train() -> None:
    """What a trainer leaves in `lora`: a LoRA on the attention of the emulator, with random values."""
    shutil.rmtree("lora", ignore_errors=True)
    pico.save_lora(Path("lora"), Path("emulator"), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def train_by_the_page(page: Path) -> None:
    """The Python of the page on heads, on a LoRA with random values."""
    names: dict[str, Any] = {**vars(peft), "AutoModelForSequenceClassification": None}
    names["AutoModelForSequenceClassification"] = transformers.AutoModelForSequenceClassification
    exec(compile(blocks(page, "python")[0], str(page), "exec"), names)
    for name, parameter in names["model"].named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    names["model"].save_pretrained("lora")


@pytest.fixture
def workplace(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a page's reader has made before, under the names that the pages use."""
    monkeypatch.chdir(tmp_path)
    for source, name in (
        *((run.base, "base"), (run.calibration, "calibration"), (run.calibration, "calibration-a")),
        *((run.emulator, "emulator"), (run.adapter, "lora"), (run.corrected, "corrected")),
        *((run.emulator, "demo-run/emulator"), (run.corrected, "demo-run/corrected")),
    ):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "data").mkdir()
    shutil.copyfile(run.data, tmp_path / "data" / "train.jsonl")
    pico.save_texts(tmp_path / "heldout.jsonl", count=4, seed=1)
    save_labelled(tmp_path / "labelled.jsonl")
    return tmp_path


def prepare(page: str, workplace: Path) -> Callable[[], None]:
    """What a page presupposes besides; returns what stands in for its trainer."""
    if page == "docs/experts.md":
        shutil.rmtree(workplace / "base")
        pico.save_model(workplace / "base", "qwen3-moe")
    if page == "docs/machines.md":
        execute("emloc-tools calibrate --base base --data heldout.jsonl --gradients --output calibration-b")
        execute("emloc-tools calibrate --base base --data data/train.jsonl --gradients --output calibration-a")
    if page == "docs/heads.md":
        shutil.copyfile("labelled.jsonl", "heldout.jsonl")
        return lambda: train_by_the_page(ROOT / page)
    return train


@pytest.mark.parametrize("page", HERE)
def test_the_commands_of_a_page_run_in_their_order(page: str, workplace: Path) -> None:
    stand_in = prepare(page, workplace)
    ran = 0
    for line in lines(ROOT / page):
        if line.startswith(TRAINERS):
            stand_in()
        elif line.startswith("emloc-tools "):
            execute(line)
            ran += 1
    assert ran == sum(line.startswith("emloc-tools ") for line in lines(ROOT / page)) > 0


def test_a_command_that_cannot_run_is_found(workplace: Path) -> None:
    """The control: a line that parses, on a folder that is not there."""
    with pytest.raises(AssertionError, match="no-calibration"):
        execute("emloc-tools build-emulator --base BASE --calibration no-calibration --ratio 0.25 --output out")


def test_of_every_line_it_is_known_where_it_runs_or_why_not() -> None:
    assert unaccounted() == []


def test_a_line_that_nobody_runs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a page that nobody goes through, and a program that is no trainer on one that is."""
    (tmp_path / "docs").mkdir()
    page, known = tmp_path / "docs" / "new.md", tmp_path / "docs" / "plan.md"
    for path in (page, known):
        path.write_text("```bash\nemloc-tools inspect base   # look\nsome-trainer emulator\nmake demo\n```\n")
    monkeypatch.setattr(page_lines, "PAGES", [page, known])
    monkeypatch.setattr(page_lines, "ROOT", tmp_path)
    assert unaccounted() == [
        ("docs/new.md", "emloc-tools inspect base   # look"),
        ("docs/new.md", "some-trainer emulator"),
        ("docs/plan.md", "some-trainer emulator"),
    ]


def test_the_lists_hold_nothing_that_is_not_there() -> None:
    names = {name_of(page) for page in PAGES}
    assert {*HERE, *BY_OTHERS} <= names
    everything = [line for page in PAGES for line in lines(page)]
    used = {beginning for beginning in (*NOT_RUN, *TRAINERS) for line in everything if line.startswith(beginning)}
    assert used == {*NOT_RUN, *TRAINERS}
    for page, test in BY_OTHERS.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")
