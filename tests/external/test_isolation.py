"""The environments hold what a trainer has, and nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.external import environments
from tests.external.environments import Environment, main
from tests.external.workshop import FOREIGN


def test_nothing_of_emloc_tools_can_be_imported_where_emulators_are_trained(
    trained: dict[str, Any], environment: str
) -> None:
    found = trained[environment]["environment"]
    assert found["importable"] == []
    assert found["imported"] == []


def test_the_environment_of_the_tests_has_what_the_trainers_lack() -> None:
    """Otherwise the names looked for above would be wrong."""
    for name in FOREIGN:
        __import__(name)


def test_the_environments_hold_the_pinned_releases(trained: dict[str, Any], environment: str) -> None:
    lines = Environment(environment).constraints.read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0] for line in lines]
    found = trained[environment]["environment"]["versions"]
    for name in ("transformers", "peft"):
        assert f"{name}=={found[name]}" in pins


def test_old_and_new_are_two_generations_of_transformers(trained: dict[str, Any]) -> None:
    majors = [trained[name]["environment"]["versions"]["transformers"].split(".")[0] for name in ("old", "new")]
    assert majors == ["4", "5"]


def test_a_missing_or_stale_environment_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    absent = Environment("new")
    assert not absent.is_current()
    monkeypatch.undo()
    present = Environment("new")
    assert present.is_current()
    monkeypatch.setattr(environments, "HERE", tmp_path)
    (tmp_path / "constraints-new.txt").write_text("transformers==5.0.0\n", encoding="utf-8")
    assert not present.is_current()


def test_making_current_environments_again_changes_nothing(environments: tuple[str, ...]) -> None:
    stamps = [Environment(name).stamp for name in environments]
    before = [stamp.stat().st_mtime_ns for stamp in stamps]
    main([])
    assert [stamp.stat().st_mtime_ns for stamp in stamps] == before
