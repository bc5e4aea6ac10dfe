"""Single files: whole or not there, and never over what somebody else put under the name."""

from __future__ import annotations

from pathlib import Path

import pytest

from emloc_tools.errors import InputError
from emloc_tools.files import single
from emloc_tools.files.single import check_file, write_file

TEXT = "Größe\r\nnäher\n"


def test_the_file_holds_the_text_as_it_is(tmp_path: Path) -> None:
    write_file(tmp_path / "a.md", TEXT)
    assert (tmp_path / "a.md").read_bytes() == TEXT.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failure_leaves_what_was_there(before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.md"
    if before is not None:
        path.write_text(before)

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(single.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, TEXT)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == ({} if before is None else {"a.md": before})


def test_an_existing_file_needs_overwrite_and_nothing_else_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"file exists; choose another --to, or replace it by --overwrite$"):
        check_file(tmp_path / "file", "--to", overwrite=False)
    check_file(tmp_path / "file", "--to", overwrite=True)
    check_file(tmp_path / "new", "--to", overwrite=False)
    for name in ("folder", "dangling"):
        with pytest.raises(InputError, match=rf"{name} exists and is no file; choose another --to$"):
            check_file(tmp_path / name, "--to", overwrite=True)


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no is no folder; --to takes a file in an existing one"):
        check_file(tmp_path / "no" / "a.md", "--to", overwrite=False)
