"""report on the command line: a file per format, what it says of itself, and refusals before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.conftest import Run
from tests.stages.reference import read_json


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json"])
def test_the_ending_of_the_output_tells_its_format(name: str, run: Run, invoke: Invoke, tmp_path: Path) -> None:
    printed = json.loads(invoke("report", run.emulator, run.corrected, "--output", name, "--json").stdout)
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert printed == {
        "output": name,
        "format": name.partition(".")[2],
        "folders": 2,
        "losses": 0,
        "plans": 0,
        "nbytes": len(text.encode()),
    }
    begin = {"html": "<!doctype html>", "md": "# Report on emulator, corrected", "json": "{"}
    assert text.startswith(begin[printed["format"]])


def test_the_json_holds_what_the_manifests_hold(run: Run, invoke: Invoke) -> None:
    assert invoke("report", run.emulator, "--output", "data", "--format", "json").status == 0
    (subject,) = read_json(Path("data"))["subjects"]
    layers = read_json(run.emulator / "emulator.json")["layers"]
    found = {row["layer"]: (row["rank"], row["relative_error"]) for row in subject["inspection"]["layers"]}
    assert found == {name: (layer["rank"], layer["relative_error"]) for name, layer in layers.items()}
    assert [spectrum["layer"] for spectrum in subject["spectra"]] == list(layers)


def test_an_existing_file_is_kept_unless_it_may_be_replaced(run: Run, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    printed = invoke("report", run.corrected, "--output", "report.md")
    assert printed.status == 1
    assert printed.error == "Error: report.md exists; choose another --output, or replace it by --overwrite"
    assert (tmp_path / "report.md").read_text() == "mine"
    assert invoke("report", run.corrected, "--output", "report.md", "--overwrite").status == 0
    assert (tmp_path / "report.md").read_text().startswith("# Report on corrected")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["{corrected}", "--output", "report.pdf"],
            "has none of the endings .html, .htm, .json, .md; give one, or pass",
        ),
        (["{corrected}", "--output", "no/report.md"], "no is no folder; --output takes a file in an existing one"),
        (["{corrected}", "--output", "."], "has none of the endings"),
        (["nowhere", "--output", "report.md"], "nowhere does not exist; report takes folders of emloc-tools"),
        (["{data}", "--output", "report.md"], "is neither a plan (plan --save) nor what evaluate --json prints"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: list[str], error: str, run: Run, invoke: Invoke, tmp_path: Path
) -> None:
    printed = invoke("report", *(argument.format(corrected=run.corrected, data=run.data) for argument in arguments))
    assert (printed.status, printed.stdout) == (1, "")
    assert error in printed.error
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_is_left_by_a_failure(
    run: Run, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("emloc_tools.files.single.os.fsync", full)
    printed = invoke("report", run.corrected, "--output", "report.md")
    assert printed.status == 1
    assert "No space left on device" in printed.error
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_page_is_refused_before_any_work_and_text_is_not(
    run: Run, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    printed = invoke("report", run.emulator, "--output", "report.html")
    assert printed.status == 1
    assert 'pip install "emloc-tools[report]", or use --format md or json' in printed.error
    assert printed.stderr.count("\n") == 1  # no progress
    assert invoke("report", run.emulator, "--output", "report.md").status == 0
