"""Whatever happens to the bytes of a golden folder, its reader refuses it or reads what it would have read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emloc_tools.errors import FormatError
from tests.formats.golden import golden, read_all

# Folders whose tensors all have hashes: a change of a value cannot pass.
HASHED = [
    ("calibration", "ok-shared-input"),
    ("calibration", "ok-gradients"),
    ("emulator", "ok-linear-shards"),
    ("adapter", "ok-corrected"),
]
FOLDERS = [
    *HASHED,
    ("emulator", "ok-conv1d-bfloat16"),
    ("emulator", "ok-weighted"),
    ("adapter", "ok-trained-rslora-patterns"),
]
TELLING = b'0123456789-+.eE[]{}",:\\/ntru\x00\xff'
quick = settings(
    max_examples=120, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def copied(kind: str, name: str, root: Path) -> Path:
    folder = root / kind
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(golden(kind, name), folder)
    return folder


def mutate(data: st.DataObject, original: bytes) -> bytes:
    """One to three changes: a byte, bytes cut out, put in or repeated, the end cut off."""
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        length = data.draw(st.integers(1, 12))
        match data.draw(st.sampled_from(["set", "tell", "cut", "insert", "repeat", "end"])):
            case "set":
                changed[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "tell":
                changed[at : at + 1] = bytes([data.draw(st.sampled_from(list(TELLING)))])
            case "cut":
                del changed[at : at + length]
            case "insert":
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "repeat":
                changed[at:at] = changed[at : at + length]
            case "end":
                del changed[at:]
    return bytes(changed)


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
@quick
@given(data=st.data())
def test_any_mutated_file_gives_a_format_error_or_is_read(
    tmp_path: Path, kind: str, name: str, data: st.DataObject
) -> None:
    folder = copied(kind, name, tmp_path)
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    path.write_bytes(mutate(data, path.read_bytes()))
    message = ""
    try:
        read_all(kind, folder)
    except FormatError as error:
        message = str(error)
    assert message == "" or message.isprintable()


@pytest.mark.parametrize(("kind", "name"), HASHED)
@quick
@given(data=st.data())
def test_mutated_weights_are_refused_or_read_unchanged(
    tmp_path: Path, kind: str, name: str, data: st.DataObject
) -> None:
    folder = copied(kind, name, tmp_path)
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    path.write_bytes(mutate(data, path.read_bytes()))
    try:
        found = read_all(kind, folder)
    except FormatError:
        return
    assert equal(found, read_all(kind, golden(kind, name)))


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_a_file_cut_anywhere_or_missing_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    folder = copied(kind, name, tmp_path)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".md", ".py"):  # no reader looks into these
            continue
        data = path.read_bytes()
        ends = {0, 1, 7, 8, len(data) // 2, len(data.rstrip()) - 1}
        for end in ends:
            path.write_bytes(data[:end])
            with pytest.raises(FormatError):
                read_all(kind, folder)
        path.write_bytes(data)
        if path.name != "emloc.json":
            path.unlink()
            with pytest.raises(FormatError):
                read_all(kind, folder)
            path.write_bytes(data)
    assert equal(read_all(kind, folder), read_all(kind, golden(kind, name)))


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_a_link_out_of_the_folder_in_the_place_of_any_file_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    for file in sorted(path.name for path in golden(kind, name).iterdir() if path.suffix != ".md"):
        folder = copied(kind, name, tmp_path)
        (folder / file).replace(tmp_path / "elsewhere")
        (folder / file).symlink_to(tmp_path / "elsewhere")  # the very same content
        with pytest.raises(FormatError, match="is a link that leads out of its folder"):
            read_all(kind, folder)


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_a_folder_in_the_place_of_any_file_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    for file in sorted(path.name for path in golden(kind, name).iterdir() if path.suffix != ".md"):
        folder = copied(kind, name, tmp_path)
        (folder / file).unlink()
        (folder / file).mkdir()
        with pytest.raises(FormatError):
            read_all(kind, folder)
