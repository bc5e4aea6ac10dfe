"""What commands print: one JSON object with --json, nothing with --quiet, progress on stderr, tables never cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emloc_tools.stages.calibrate import calibrate
from tests import pico
from tests.cli.conftest import Invoke
from tests.conftest import Run

LINES = {
    "calibrate": "calibrate --base {base} --data {data} --device cpu --max-length 32 --output out",
    "merge-calibration": "merge-calibration {calibration} {other} --output out",
    "build-emulator": "build-emulator --base {base} --calibration {calibration} --ratio 0.5 --output out",
    "truncate": "truncate --emulator {emulator} --ratio 0.2 --output out",
    "correct": "correct --emulator {emulator} --adapter {adapter} --base {base} --output out",
    "merge": "merge --base {base} --adapter {corrected} --output out",
    "evaluate": "evaluate --base {base} --adapter {adapter} --adapter {corrected} --data {data} --device cpu",
    "inspect": "inspect {corrected}",
}


@pytest.fixture(scope="module")
def other(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration on other data than that of the run."""
    root = tmp_path_factory.mktemp("other")
    data = pico.save_texts(root / "more.jsonl", count=2, seed=1)
    calibrate(base=str(run.base), data=data, output=root / "calibration", device="cpu")
    return root / "calibration"


def words(name: str, run: Run, other: Path) -> list[str]:
    """The arguments of a command on the run's folders."""
    places = {key: getattr(run, key) for key in ("base", "data", "calibration", "emulator", "adapter", "corrected")}
    return [word.format(**places, other=other) for word in LINES[name].split()]


@pytest.mark.parametrize("name", LINES)
def test_json_is_one_object_on_stdout_and_progress_is_on_stderr(
    name: str, run: Run, other: Path, invoke: Invoke
) -> None:
    printed = invoke(*words(name, run, other), "--json")
    assert printed.status == 0
    assert printed.stdout.count("\n") == 1
    assert isinstance(json.loads(printed.stdout), dict)
    if name != "inspect":
        assert " of " in printed.stderr.splitlines()[0]


@pytest.mark.parametrize("name", LINES)
def test_quiet_prints_nothing(name: str, run: Run, other: Path, invoke: Invoke) -> None:
    printed = invoke(*words(name, run, other), "--quiet")
    assert (printed.status, printed.stdout, printed.stderr) == (0, "", "")


@pytest.mark.parametrize("name", LINES)
def test_quiet_and_json_print_the_object_alone(name: str, run: Run, other: Path, invoke: Invoke) -> None:
    printed = invoke(*words(name, run, other), "--quiet", "--json")
    assert isinstance(json.loads(printed.stdout), dict)
    assert printed.stderr == ""


@pytest.mark.parametrize("name", ["calibrate", "evaluate", "correct"])
def test_a_failed_command_prints_no_object(name: str, run: Run, other: Path, invoke: Invoke) -> None:
    broken = [word if word != str(run.base) else "nowhere" for word in words(name, run, other)]
    printed = invoke(*broken, "--json")
    assert (printed.status, printed.stdout) == (1, "")
    assert printed.error


def of_json(name: str, run: Run, other: Path, invoke: Invoke) -> Any:
    """The object that a command prints."""
    return json.loads(invoke(*words(name, run, other), "--json", "--quiet").stdout)


def test_the_objects_hold_what_was_written(run: Run, other: Path, invoke: Invoke, tmp_path: Path) -> None:
    built = of_json("build-emulator", run, other, invoke)
    assert built["manifest"] == json.loads((tmp_path / "out" / "emulator.json").read_text())
    assert built["folder"] == "out"


def test_the_object_of_correct_holds_the_figures_of_its_manifest(
    run: Run, other: Path, invoke: Invoke, tmp_path: Path
) -> None:
    corrected = of_json("correct", run, other, invoke)
    assert corrected["layers"] == json.loads((tmp_path / "out" / "emloc.json").read_text())["layers"]
    dry = json.loads(invoke(*words("correct", run, other)[:-2], "--dry-run", "--json", "--quiet").stdout)
    assert dry == {**corrected, "output": None}


def test_evaluate_gives_a_result_per_model_and_adapter(run: Run, other: Path, invoke: Invoke) -> None:
    results = of_json("evaluate", run, other, invoke)["results"]
    assert [result["adapter"] for result in results] == [None, str(run.adapter), str(run.corrected)]
    fields = {"model", "adapter", "corrected", "loss", "perplexity", "accuracy", "exact", "tokens", "predicts"}
    assert all(result.keys() == fields for result in results)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("columns", [80, 110])
def test_nothing_printed_is_cut_or_padded(name: str, columns: int, run: Run, other: Path, invoke: Invoke) -> None:
    printed = invoke(*words(name, run, other), columns=columns)
    assert printed.status == 0
    for line in printed.stdout.splitlines():
        assert "…" not in line
        assert line == line.rstrip()


def test_the_next_command_is_one_line_to_paste(run: Run, invoke: Invoke) -> None:
    arguments = ("--base", run.base, "--data", run.data, "--device", "cpu", "--output", "my folder")
    (line,) = [line for line in invoke("calibrate", *arguments).stdout.splitlines() if "build-emulator" in line]
    command = f"emloc-tools build-emulator --base {run.base} --calibration 'my folder' --ratio 0.25 --output EMULATOR"
    assert line.partition("next")[2].strip() == command


def test_correct_shows_the_size_of_each_correction_relative_to_its_update(
    run: Run, other: Path, invoke: Invoke
) -> None:
    text = invoke(*words("correct", run, other)).stdout
    records = json.loads((run.corrected / "emloc.json").read_text())["layers"]
    table = text.partition("Largest corrections")[2].splitlines()
    assert "‖D‖/‖sB'‖" in table[1]
    shown = {line.split()[0]: float(line.split()[-1]) for line in table[2:14]}
    sizes = {name: record["delta_norm"] / record["update_norm"] for name, record in records.items()}
    assert list(shown) == sorted(sizes, key=lambda name: -sizes[name])[:12]
    assert all(shown[name] == pytest.approx(sizes[name], abs=5e-4) for name in shown)


def test_a_lora_that_makes_the_base_worse_is_warned_of_on_stderr(run: Run, other: Path, invoke: Invoke) -> None:
    printed = invoke(*words("evaluate", run, other), "--json")
    losses = {result["adapter"]: result["loss"] for result in json.loads(printed.stdout)["results"]}
    warnings = [line for line in printed.stderr.splitlines() if line.startswith("Warning: ")]
    worse = [adapter for adapter in losses if adapter is not None and losses[adapter] >= losses[None]]
    assert len(warnings) == len(worse) > 0
    for adapter, warning in zip(worse, warnings, strict=True):
        assert f"the base is better without {adapter} on these data" in warning
        assert ("emloc-tools correct" in warning) == (adapter == str(run.adapter))


@pytest.mark.parametrize("interpolated", [False, True])
def test_merge_shows_what_it_changed_and_what_it_checked(run: Run, invoke: Invoke, interpolated: bool) -> None:
    options = ["--emulator", run.emulator, "--interpolate", "0.5"] if interpolated else []
    adapter = run.adapter if interpolated else run.corrected
    text = " ".join(
        invoke("merge", "--base", run.base, "--adapter", adapter, "--output", "out", *options).stdout.split()
    )
    assert "merged 21 weights copied 9 tensors" in text  # 3 blocks of 7; embedding, head and 7 norms
    assert "next emloc-tools evaluate --base out --data HELDOUT.jsonl" in text
    assert ("by 0.5 towards the emulator's weights" in text) == interpolated
    expected = (
        "30 tensors are those that the emulator was made from" if interpolated else "the adapter was corrected for"
    )
    assert f"checked {expected}" in text or f"checked architecture, names and shapes; {expected}" in text


def test_an_emulator_without_calibration_says_so(run: Run, invoke: Invoke) -> None:
    text = invoke("build-emulator", "--base", run.base, "--ratio", "0.5", "--output", "out").stdout
    assert "none: every layer is the plain SVD of its weight" in " ".join(text.split())


def test_a_log_gets_ten_lines_of_progress_per_stage(run: Run, other: Path, invoke: Invoke) -> None:
    lines = invoke(*words("build-emulator", run, other)).stderr.splitlines()
    assert len(lines) == 10
    assert [line.split()[1] for line in lines] == ["3", "5", "7", "9", "11", "13", "15", "17", "19", "21"]
