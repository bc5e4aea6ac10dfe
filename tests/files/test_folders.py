"""A result appears complete or not at all, and nothing of somebody else's is replaced."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from emloc_tools.errors import InputError
from emloc_tools.files import folders
from emloc_tools.files.folders import MARKERS, check_output, new_folder, require_folder, write_json
from emloc_tools.files.json_files import read_json


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its text."""
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def ours(folder: Path, text: str = "old") -> Path:
    """A folder as emloc-tools leaves it."""
    folder.mkdir()
    (folder / "calibration.json").write_text("{}")
    (folder / "content").write_text(text)
    return folder


def break_off(output: Path, error: type[BaseException]) -> None:
    """Begin to write and fail half way."""
    with new_folder(output, overwrite=True) as folder:
        (folder / "content").write_text("half")
        raise error


def produce(output: Path, *, overwrite: bool, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Write a folder; `meanwhile` happens before it is finished."""
    with new_folder(output, overwrite=overwrite) as folder:
        (folder / "content").write_text("new")
        meanwhile()


def no_work() -> None:
    pytest.fail("work began although the output cannot be used")


def test_a_finished_folder_bears_its_name_and_nothing_else_is_left(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "out"
    with new_folder(output, overwrite=False) as folder:
        (folder / "content").write_text("new")
        assert not output.exists()
        assert folder.parent == output.parent
    assert tree(tmp_path) == {"deep/er/out/content": "new"}
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with new_folder(tmp_path / "out", overwrite=False):
        pass
    usual, found = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "out"))
    assert found == usual != 0o700  # 0700 is what a temporary folder begins with


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_after_any_exception_nothing_is_there(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        break_off(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_any_exception_an_output_to_be_replaced_is_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    output = ours(tmp_path / "out")
    with pytest.raises(error):
        break_off(output, error)
    assert tree(tmp_path) == {"out/calibration.json": "{}", "out/content": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, rename = ours(tmp_path / "out"), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk went away"):
        produce(output, overwrite=True)
    assert tree(tmp_path) == {"out/calibration.json": "{}", "out/content": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_of_ours_is_replaced_only_on_request_and_then_as_a_whole(tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    with pytest.raises(InputError, match="already exists; choose another --output, or pass --overwrite"):
        check_output(output, overwrite=False)
    with new_folder(output, overwrite=True) as folder:
        (folder / "other").write_text("new")
        assert tree(output) == {"calibration.json": "{}", "content": "old"}  # until the very end
    assert tree(tmp_path) == {"out/other": "new"}


def test_an_empty_folder_may_be_used_without_asking(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "content").write_text("new")
    assert tree(tmp_path) == {"out/content": "new"}


@pytest.mark.parametrize("marker", MARKERS, ids=lambda marker: "+".join(sorted(marker)))
def test_every_kind_of_our_folders_is_known_by_its_files(tmp_path: Path, marker: set[str]) -> None:
    for name in marker:
        (tmp_path / name).write_text("{}")
    check_output(tmp_path, overwrite=True)
    (tmp_path / min(marker)).unlink()
    (tmp_path / "other").write_text("")
    with pytest.raises(InputError, match="files that emloc-tools did not write; --overwrite does not replace it"):
        check_output(tmp_path, overwrite=True)


@pytest.mark.parametrize(
    "names", [["notes.txt"], ["adapter_config.json", "adapter_model.safetensors"], ["config.json"], ["results.json"]]
)
def test_somebody_else_s_folder_is_never_replaced(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("theirs")
    with pytest.raises(InputError, match="did not write"):
        produce(tmp_path, overwrite=True, meanwhile=no_work)
    assert tree(tmp_path) == dict.fromkeys(names, "theirs")


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match="already exists"):
        produce(output, overwrite=False, meanwhile=lambda: ours(output, "from another run"))
    assert tree(tmp_path) == {"out/calibration.json": "{}", "out/content": "from another run"}


def test_a_link_or_a_file_in_the_place_of_the_output_is_refused(tmp_path: Path) -> None:
    ours(tmp_path / "target")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("absent")
    (tmp_path / "file").write_text("theirs")
    before = tree(tmp_path)
    for name in ("link", "dangling", "file"):
        with pytest.raises(InputError, match=f"{name} exists and is not a folder"):
            check_output(tmp_path / name, overwrite=True)
        with pytest.raises(InputError):
            produce(tmp_path / name, overwrite=True, meanwhile=no_work)
    assert tree(tmp_path) == before


def test_a_parent_that_cannot_hold_the_output_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write into .*file: .*(Not a directory|is a file, not a folder)"):
        produce(tmp_path / "file" / "out", overwrite=False, meanwhile=no_work)

    def denied(*args: object, **options: object) -> str:
        raise PermissionError(13, "Permission denied")

    # root may write everywhere, so a folder's mode would prove nothing
    monkeypatch.setattr(folders.tempfile, "mkdtemp", denied)
    with pytest.raises(InputError, match=r"cannot write into .*: Permission denied"):
        produce(tmp_path / "out", overwrite=False, meanwhile=no_work)


def test_a_name_that_the_system_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        produce(tmp_path / ("x" * 5000), overwrite=False, meanwhile=no_work)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_user_s_to_mend_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    def fill() -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(InputError, match=rf"cannot write into .*: {os.strerror(code)}; nothing was kept"):
        produce(tmp_path / "out", overwrite=False, meanwhile=fill)
    assert list(tmp_path.iterdir()) == []


def test_any_other_failure_of_the_system_keeps_its_own_error(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        produce(tmp_path / "out", overwrite=False, meanwhile=fail)


def test_relative_outputs_are_meant_from_the_working_folder_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with new_folder(Path("out"), overwrite=False) as folder:
        (folder / "content").write_text("new")
        os.chdir("elsewhere")
    assert tree(tmp_path) == {"out/content": "new"}


def test_require_folder_says_what_was_expected(tmp_path: Path) -> None:
    require_folder(tmp_path, "a calibration")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; expected the folder of a calibration"):
        require_folder(tmp_path / "file", "a calibration")
    with pytest.raises(InputError, match="absent does not exist; expected the folder of an emulator"):
        require_folder(tmp_path / "absent", "an emulator")


def test_names_that_are_not_utf8_do_not_spoil_a_manifest(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")  # as Python gives a name in another encoding
    write_json(tmp_path / "x.json", {"file": name, "plain": "café"})
    assert read_json(tmp_path / "x.json", "C1") == {"file": "caf?.jsonl", "plain": "café"}


def test_json_keeps_the_order_of_keys_and_is_plain_utf8(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": "ä", "a": [1]})
    data = (tmp_path / "x.json").read_bytes()
    assert data == '{\n  "b": "ä",\n  "a": [\n    1\n  ]\n}\n'.encode()
    assert list(json.loads(data)) == ["b", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", {"a": float("nan")})
