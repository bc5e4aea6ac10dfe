"""The note of a dense export tells which emulator it is of; what is no such note tells nothing, or is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from emloc_tools.errors import FormatError
from emloc_tools.files.exported import emulator_in, exported_emulator


def test_the_hash_is_the_one_of_the_note(tmp_path: Path) -> None:
    assert exported_emulator(tmp_path) is None
    (tmp_path / "emloc-export.json").write_text(json.dumps({"emulator": "xxh3_128:00"}))
    assert exported_emulator(tmp_path) == "xxh3_128:00"
    assert emulator_in(tmp_path) == "xxh3_128:00"


def test_an_emulator_is_known_by_the_bytes_of_its_manifest(tmp_path: Path) -> None:
    assert emulator_in(tmp_path) is None
    (tmp_path / "emulator.json").write_bytes(b"{}")
    assert emulator_in(tmp_path) == f"xxh3_128:{xxhash.xxh3_128(b'{}').hexdigest()}"
    assert exported_emulator(tmp_path) is None


@pytest.mark.parametrize("value", [{}, {"emulator": None}, {"emulator": 3}])
def test_a_note_without_a_hash_names_no_emulator(tmp_path: Path, value: dict[str, object]) -> None:
    (tmp_path / "emloc-export.json").write_text(json.dumps(value))
    assert exported_emulator(tmp_path) is None


def test_a_note_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "emloc-export.json").write_text("{")
    with pytest.raises(FormatError, match="strict JSON"):
        exported_emulator(tmp_path)
