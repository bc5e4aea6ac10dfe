"""What a report is on: everything under the given paths, and what was made from what, by hash or by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from emloc_tools.errors import FormatError, InputError
from emloc_tools.reporting.collecting import Report, collect
from tests.conftest import Run
from tests.stages.reference import read_json

PLAN = Path(__file__).parent.parent.parent / "formats" / "plan" / "golden"


def origins(report: Report, made: str) -> dict[str, tuple[str | None, str]]:
    """What a folder was made from: by kind, the name of the source and how it is known."""
    return {link.kind: (link.source, link.by) for link in report.links if link.made == made}


def test_a_run_is_found_whole_and_in_the_order_of_the_method(collected: Report) -> None:
    assert [each.name for each in collected.subjects] == ["base", "calibration", "emulator", "adapter", "corrected"]


def test_everything_is_linked_to_what_it_was_made_from(collected: Report) -> None:
    assert origins(collected, "calibration") == {"base": ("base", "name")}
    assert origins(collected, "emulator") == {"base": ("base", "name"), "calibration": ("calibration", "hash")}
    assert origins(collected, "adapter") == {"emulator": ("emulator", "name")}
    assert origins(collected, "corrected") == {
        "base": ("base", "name"),
        "emulator": ("emulator", "hash"),
        "trained adapter": ("adapter", "hash"),
    }


def test_another_folder_under_the_same_name_is_no_source(run: Run, tmp_path: Path) -> None:
    """The control: an emulator with one other field is another emulator, and the LoRA was not made from it."""
    for name in ("emulator", "corrected"):
        shutil.copytree(getattr(run, name), tmp_path / name)
    report = collect([tmp_path])
    assert origins(report, "corrected")["emulator"] == ("emulator", "hash")
    manifest = read_json(tmp_path / "emulator" / "emulator.json")
    manifest["made_by"]["command"] += " again"
    (tmp_path / "emulator" / "emulator.json").write_text(json.dumps(manifest))
    assert origins(collect([tmp_path]), "corrected")["emulator"] == (None, "hash")


def test_what_a_trainer_calls_the_base_is_not_taken_for_it(run: Run) -> None:
    assert origins(collect([run.adapter]), "adapter") == {"model": (None, "name")}
    assert origins(collect([run.corrected]), "corrected")["base"] == (None, "name")


def test_single_folders_and_files_can_be_given_with_others(run: Run, tmp_path: Path) -> None:
    evaluation = {"model": "base", "adapter": None, "corrected": False, "loss": 2.0, "accuracy": 0.5}
    (tmp_path / "losses.json").write_text(json.dumps({"results": [evaluation]}))
    shutil.copyfile(next(PLAN.glob("ok-*")), tmp_path / "plan.json")
    report = collect([run.emulator, run.emulator, tmp_path])
    assert [each.name for each in report.subjects] == ["emulator"]
    assert [losses.name for losses in report.losses] == ["losses.json"]
    assert list(report.plans) == ["plan.json"]
    assert collect([tmp_path / "losses.json"]).losses == report.losses


def test_folders_that_end_alike_are_told_apart_by_their_paths(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.corrected, tmp_path / "corrected")
    names = [each.name for each in collect([run.corrected, tmp_path / "corrected"]).subjects]
    assert names == [str(run.corrected), str(tmp_path / "corrected")]


def test_json_of_something_else_in_a_run_is_passed_over_but_refused_if_given(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.corrected, tmp_path / "corrected")
    (tmp_path / "settings.json").write_text("{}")
    assert [each.name for each in collect([tmp_path]).subjects] == ["corrected"]
    with pytest.raises(InputError, match=r"settings\.json is neither a plan .* nor what evaluate --json prints"):
        collect([tmp_path / "settings.json"])


def test_paths_with_nothing_to_report_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds nothing to report on: neither one of calibration\.json"):
        collect([tmp_path])
    with pytest.raises(InputError, match=r"nowhere does not exist; report takes folders of emloc-tools"):
        collect([tmp_path / "nowhere"])


def test_a_damaged_folder_in_a_run_is_an_error_and_not_left_out(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.corrected, tmp_path / "corrected")
    (tmp_path / "emulator").mkdir()
    (tmp_path / "emulator" / "emulator.json").write_text("{}")
    with pytest.raises(FormatError, match=r"emulator\.json"):
        collect([tmp_path])
