"""diffusers learns of emulators when emloc_tools is imported before it, and when after; neither imports the other."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from emloc_tools import plugin

MODULE = "table_of_a_library"


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A module in place of that with the table, and what registering finds in it, each time."""
    found: list[str] = []
    (tmp_path / f"{MODULE}.py").write_text("state = 'ready'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if not isinstance(each, plugin._Finder)])
    monkeypatch.setattr(plugin, "TABLE", MODULE)
    monkeypatch.setattr(plugin, "_register", lambda: found.append(getattr(sys.modules[MODULE], "state", "not yet")))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return found


def test_the_entry_is_made_once_the_module_has_run(entries: list[str]) -> None:
    plugin.install()
    assert entries == []
    assert MODULE not in sys.modules
    module = importlib.import_module(MODULE)
    assert entries == ["ready"]
    assert module.__spec__ is not None
    assert module.__spec__.origin == module.__file__  # found as Python would have found it
    del sys.modules[MODULE]


def test_the_entry_is_made_at_once_where_the_module_is_imported_already(entries: list[str]) -> None:
    importlib.import_module(MODULE)
    assert entries == []  # control: nobody was there to do it
    plugin.install()
    assert entries == ["ready"]
    del sys.modules[MODULE]


def test_other_modules_are_left_to_others_and_a_second_install_does_nothing(entries: list[str]) -> None:
    plugin.install()
    plugin.install()
    finders = [each for each in sys.meta_path if isinstance(each, plugin._Finder)]
    assert len(finders) == 1
    assert finders[0].find_spec("json") is None
    importlib.import_module(MODULE)
    assert entries == ["ready"]
    del sys.modules[MODULE]


def test_an_unknown_release_is_a_warning_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers must go on working for whoever only imported both."""
    monkeypatch.setitem(sys.modules, "emloc_tools.models.diffusers_quantizer", None)
    with pytest.warns(UserWarning, match="cannot load emulators of emloc-tools"):
        plugin._register()
