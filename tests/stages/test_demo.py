"""demo: it runs the commands that anyone would, keeps their figures, and says which one failed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from emloc_tools.errors import EmlocError
from emloc_tools.stages import demo as stage
from emloc_tools.stages.demo import demo
from tests import pico
from tests.stages.demo_commands import FIGURES, Commands, lines_of
from tests.stages.reference import contents

LENGTH = ["--max-length", "256"]


@pytest.fixture
def base(tmp_path: Path) -> str:
    """What stands for a base where no command runs."""
    (tmp_path / "base").mkdir()
    return str(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pico.save_texts(tmp_path / "mine.jsonl", 25)


@pytest.mark.parametrize("trusted", [False, True])
def test_the_commands_are_those_of_the_method_in_order(
    base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    commands = Commands(monkeypatch)
    options = {"steps": 7, "learning_rate": 0.001, "refinement": 3, "trust_remote_code": trusted}
    result = demo(output=tmp_path / "out", base=base, data=data, ratios=[0.1, 0.5], **options)
    trust = ["--trust-remote-code"] if trusted else []
    of_base = ["--base", base, *trust]
    how = ["--steps", "7", "--learning-rate", "0.001", "--dtype", "auto", *LENGTH]
    train, held_out = ["--data", "data/train.jsonl"], ["--data", "data/heldout.jsonl", *LENGTH, "--dtype", "auto"]

    def ours(*line: str) -> list[str]:
        return ["-m", "emloc_tools", *line, "--json"]

    def trainer(model: str, output: str, *more: str) -> list[str]:
        return ["train_lora.py", "--model", model, *train, "--output", output, *how, *more]

    def transfer(ratio: str) -> list[list[str]]:
        emulator, lora = f"emulator-{ratio}", f"lora-{ratio}"
        built = ["--calibration", "calibration", "--ratio", ratio, "--output", emulator]
        pair = ["--emulator", emulator, "--adapter", lora]
        return [
            ours("build-emulator", *of_base, *built),
            trainer(emulator, lora, "--trust-remote-code"),  # its own code, whatever is said of the base's
            ours("correct", *pair, *of_base, "--output", f"corrected-{ratio}"),
        ]

    gathered = ["--dtype", "auto", "--gradients", "--output", "calibration"]
    adapters = ["lora-on-base", "lora-0.5", "corrected-0.5", "lora-0.1", "corrected-0.1", "refined-0.1"]
    steps = ["--steps", "3", "--batch-size", "8", "--dtype", "auto", "--output", "refined-0.1"]
    evaluated = [text for name in adapters for text in ("--adapter", name)]
    assert commands.lines == [
        trainer(base, "lora-on-base", *trust),
        ours("calibrate", *of_base, *train, *LENGTH, *gathered),
        *transfer("0.5"),
        *transfer("0.1"),
        ours("refine", *of_base, "--adapter", "corrected-0.1", *train, *LENGTH, *steps),
        ours("evaluate", *of_base, *evaluated, *held_out),
        ours("evaluate", "--emulator", "emulator-0.5", "--adapter", "lora-0.5", *held_out),
        ours("evaluate", "--emulator", "emulator-0.1", "--adapter", "lora-0.1", *held_out),
    ]
    shown = [shlex.split(command) for command in result.commands]
    ran = [["python", *line] if line[0] != "-m" else ["emloc-tools", *line[2:-1]] for line in commands.lines]
    assert shown == ran
    assert lines_of(tmp_path / "out" / "commands.sh")[1:] == result.commands


def test_every_score_and_training_is_put_where_it_belongs(
    base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Commands(monkeypatch)
    result = demo(output=tmp_path / "out", base=base, data=data, ratios=[0.1, 0.5], steps=7)
    found = {(s.model, s.ratio, s.adapter): (s.loss, s.perplexity, s.accuracy) for s in result.scores}
    assert len(found) == len(result.scores)
    numbers = {
        ("base", None, "none"): 0,
        ("base", None, "trained on the base"): 1,
        ("base", 0.5, "uncorrected"): 2,
        ("base", 0.5, "corrected"): 3,
        ("base", 0.1, "uncorrected"): 4,
        ("base", 0.1, "corrected"): 5,
        ("base", 0.1, "refined"): 6,
        **{("emulator", ratio, name): n for ratio in (0.5, 0.1) for n, name in enumerate(("none", "uncorrected"))},
    }
    assert found == {key: (n, 10 + n, 20 + n) for key, n in numbers.items()}
    assert result.loss("base", 0.1, "corrected") == 5
    assert result.loss("base", 0.2, "corrected") is None
    assert [training.ratio for training in result.trainings] == [None, 0.5, 0.1]
    for t in result.trainings:
        values = (t.seconds, t.peak_bytes, t.idle_bytes, t.parameters, t.parameter_bytes, t.first_loss, t.last_loss)
        assert values == tuple(FIGURES.values())


def test_without_an_upper_bound_nothing_is_trained_on_the_base(
    base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(monkeypatch)
    result = demo(output=tmp_path / "out", base=base, data=data, ratios=[0.5], upper_bound=False, refinement=0)
    assert not any("refine" in line for line in commands.lines)
    assert [line[2] for line in commands.lines if line[0] == "train_lora.py"] == ["emulator-0.5"]
    assert result.loss("base", None, "trained on the base") is None


def test_the_shipped_model_and_data_are_used_where_none_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(monkeypatch)
    result = demo(output=tmp_path / "out", ratios=[0.5])
    shipped = Path(stage.__file__).parent.parent / "demo"
    for name in ("base", "data"):
        assert contents(tmp_path / "out" / name) == contents(shipped / name)
    assert result.base == "base"
    assert commands.lines[1][2:5] == ["calibrate", "--base", "base"]


@pytest.mark.parametrize(
    ("fail", "stderr", "message"),
    [
        (
            "correct",
            "a warning\nError: out of luck\n",
            r"^correct 0\.5 failed: out of luck \(command: emloc-tools corr",
        ),
        ("train_lora.py", "Traceback\nValueError: bad\n", r"^train base failed: ValueError: bad \(command: python tra"),
        (
            "calibrate",
            " \n",
            r"^calibrate failed: exit status 1 \(command: emloc-tools calibrate --base .*calibration\)$",
        ),
    ],
)
def test_a_command_that_fails_is_named_with_its_last_words(
    fail: str, stderr: str, message: str, base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(monkeypatch, fail, stderr)
    before = set(tmp_path.iterdir())
    with pytest.raises(EmlocError, match=message):
        demo(output=tmp_path / "out", base=base, data=data, ratios=[0.5])
    assert fail in commands.lines[-1]  # nothing ran after it
    assert set(tmp_path.iterdir()) == before
