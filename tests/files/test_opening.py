"""Files of an artifact are regular files inside its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from emloc_tools.errors import FormatError
from emloc_tools.files.opening import open_regular, path_inside
from tests.files.literal import put


def test_a_file_and_a_link_inside_the_folder_are_found(tmp_path: Path) -> None:
    put(tmp_path, "a", b"text")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        path = path_inside(tmp_path, name, "C4")
        assert path == tmp_path / name
        with open_regular(path, "C4") as file:
            assert file.read() == b"text"


def test_a_missing_file_and_a_link_to_nothing_are_none(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("absent")
    assert path_inside(tmp_path, "absent", "C4") is None
    assert path_inside(tmp_path, "link", "C4") is None
    assert path_inside(put(tmp_path, "file", b""), "below-a-file", "C4") is None


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    put(tmp_path, "secret", b"")
    (folder / "relative").symlink_to("../secret")
    (folder / "absolute").symlink_to(tmp_path / "secret")
    (folder / "inner").symlink_to(tmp_path)
    for name in ("relative", "absolute", "inner"):
        with pytest.raises(FormatError, match=r"is a link that leads out of its folder \(format rule E4\)"):
            path_inside(folder, name, "E4")


def test_a_folder_that_is_itself_a_link_is_as_good_as_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    put(tmp_path / "real", "a", b"")
    (tmp_path / "alias").symlink_to("real")
    assert path_inside(tmp_path / "alias", "a", "C4") == tmp_path / "alias" / "a"


def test_the_hub_cache_may_link_to_its_blobs_and_to_nothing_else(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    put(blobs, "cafe", b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    assert path_inside(snapshot, "model.safetensors", "E4") == snapshot / "model.safetensors"
    put(blobs.parent, "refs", b"")
    (snapshot / "other").symlink_to("../../refs")
    with pytest.raises(FormatError, match="leads out"):
        path_inside(snapshot, "other", "E4")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FormatError, match="cannot be read"):
        path_inside(tmp_path, "a", "C4")


@pytest.mark.parametrize("name", ["a" * 5000, "nul\0byte"])
def test_a_name_that_the_system_does_not_take_is_refused(tmp_path: Path, name: str) -> None:
    for act in (lambda: path_inside(tmp_path, name, "C4"), lambda: open_regular(tmp_path / name, "C4")):
        with pytest.raises(FormatError, match="cannot be read") as caught:
            act()
        assert str(caught.value).isprintable()
