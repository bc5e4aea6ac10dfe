"""A result appears complete or not at all, and nothing of somebody else's is replaced."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emloc_tools.errors import EmlocError, InputError
from emloc_tools.files import folders
from emloc_tools.files.folders import KINDS, check_output, new_folder, require_folder, write_json
from emloc_tools.files.json_files import read_json
from emloc_tools.models.source import COMPANIONS
from tests.formats.golden import golden

SHARD = "calibration-00001-of-00001.safetensors"


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its text."""
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def ours(folder: Path, text: str = "old") -> Path:
    """A folder as emloc-tools leaves it."""
    folder.mkdir()
    (folder / "calibration.json").write_text("{}")
    (folder / SHARD).write_text(text)
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


def fill(folder: Path, names: str) -> Path:
    """A folder with the named files, each holding its name."""
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


# What the commands leave, with companions of a base that has many, and what comes of use.
CALIBRATION = "calibration.json calibration-00001-of-00002.safetensors calibration-00002-of-00002.safetensors"
SHARDS = "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json"
BASE = "config.json README.md tokenizer.json vocab.txt merges.txt spiece.model chat_template.jinja LICENSE.md NOTICE"
EMULATOR = f"emulator.json {SHARDS} {BASE} modeling_emloc.py __pycache__/modeling_emloc.cpython-311.pyc"
ADAPTER = "adapter_config.json adapter_model.safetensors"
DEMO = " ".join(
    [
        "results.json commands.sh train_lora.py data/README.md data/train.jsonl data/heldout.jsonl",
        *(f"base/{name}" for name in ["model.safetensors", *BASE.split()]),
        *(f"calibration/{name}" for name in CALIBRATION.split()),
        *(f"emulator-0.25/{name}" for name in EMULATOR.split()),
        *(f"lora-{of}/{name}" for of in ("0.25", "on-base") for name in f"{ADAPTER} README.md training.json".split()),
        *(f"{kind}-0.25/{name}" for kind in ("corrected", "refined") for name in f"{ADAPTER} emloc.json".split()),
    ]
)
WRITTEN = {
    "calibration": CALIBRATION,
    "emulator": EMULATOR,
    "small emulator": "emulator.json model.safetensors config.json README.md modeling_emloc.py",
    "adapter": f"{ADAPTER} emloc.json",
    "merged model": f"emloc-merge.json {SHARDS} {BASE} modeling_own.py tokenization_own.py",
    "demo": DEMO,
}
STRANGERS = [  # a kind, what was put into it, and what of that is named
    ("calibration", "notes.txt", "notes.txt"),
    ("calibration", "calibration-2/calibration.json", "calibration-2"),
    ("emulator", "lora/adapter_config.json", "lora"),
    ("emulator", "adapter_model.safetensors", "adapter_model.safetensors"),
    ("emulator", "checkpoint-80/config.json", "checkpoint-80"),
    ("emulator", "train.py", "train.py"),
    ("emulator", "__pycache__/notes.txt", "__pycache__/notes.txt"),
    ("adapter", "README.md", "README.md"),
    ("adapter", "optimizer.pt", "optimizer.pt"),
    ("merged model", "model-q4.gguf", "model-q4.gguf"),
    ("merged model", ".git/config.json", ".git"),
    ("demo", "my-lora/adapter_config.json", "my-lora"),
    ("demo", "emulator-0.25/lora/adapter_config.json", "emulator-0.25/lora"),
    ("demo", "lora-0.25/checkpoint-80/adapter_config.json", "lora-0.25/checkpoint-80"),
    ("demo", "config.json", "config.json"),
]


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
    assert tree(tmp_path) == {"out/calibration.json": "{}", f"out/{SHARD}": "old"}
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
    assert tree(tmp_path) == {"out/calibration.json": "{}", f"out/{SHARD}": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def no_rename(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Endings, or whole names without one, of what cannot be renamed once they are put in here."""
    refused: set[str] = set()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if (self.suffix or self.name) in refused:
            raise OSError(errno.EIO, "the disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    return refused


def test_an_old_output_that_cannot_be_put_back_is_kept_and_named(tmp_path: Path, no_rename: set[str]) -> None:
    output = ours(tmp_path / "out")
    no_rename |= {".partial", "old"}
    with pytest.raises(EmlocError, match=r"the disk went away.* could not be put back .* is kept in ") as caught:
        produce(output, overwrite=True)
    backup = Path(str(caught.value).partition(" is kept in ")[2])
    assert tree(backup) == {"calibration.json": "{}", SHARD: "old"}
    assert [path.name for path in tmp_path.iterdir()] == [backup.parent.name]
    no_rename.clear()
    produce(output, overwrite=True)  # and the next run leaves it alone
    assert tree(backup) == {"calibration.json": "{}", SHARD: "old"}


def test_an_old_output_that_cannot_be_moved_stays(tmp_path: Path, no_rename: set[str]) -> None:
    output = ours(tmp_path / "out")
    no_rename |= {"out"}
    with pytest.raises(OSError, match="the disk went away"):
        produce(output, overwrite=True)
    assert tree(tmp_path) == {"out/calibration.json": "{}", f"out/{SHARD}": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interruption_after_the_last_rename_leaves_the_new_output_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = ours(tmp_path / "out"), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if self.suffix == ".partial":
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        produce(output, overwrite=True)
    assert tree(tmp_path) == {"out/content": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Device and inode of everything that has been forced to disk."""
    found: list[tuple[int, int]] = []

    def record(handle: int) -> None:
        status = os.fstat(handle)
        found.append((status.st_dev, status.st_ino))

    monkeypatch.setattr(os, "fsync", record)
    return found


def test_every_file_and_folder_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, synced: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, rename = fill(tmp_path / "base", "LICENSE tokenizer/vocab.txt"), Path.rename
    before: set[tuple[int, int]] = set()

    def recording(self: Path, target: Path) -> Path:
        before.update(synced)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", recording)
    with new_folder(tmp_path / "out", overwrite=False) as folder:
        shutil.copyfile(source / "LICENSE", folder / "LICENSE")
        shutil.copytree(source / "tokenizer", folder / "tokenizer")
        (folder / "dangling").symlink_to("absent")
        assert synced == []  # the control: copying forces nothing
    written = ["", "LICENSE", "tokenizer", "tokenizer/vocab.txt"]
    status = {name: (tmp_path / "out" / name).stat() for name in written}
    assert [name for name in written if (status[name].st_dev, status[name].st_ino) not in before] == []
    parent = tmp_path.stat()
    assert synced[-1] == (parent.st_dev, parent.st_ino)  # the new name itself


def test_a_file_that_cannot_be_forced_to_disk_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        produce(tmp_path / "out", overwrite=False)
    assert list(tmp_path.iterdir()) == []


CHILD = """
import sys
from pathlib import Path
from emloc_tools.files.folders import new_folder

with new_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "calibration.json").write_text("of the child")
    print(folder, flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def child_at_work(output: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process in the middle of writing `output`, and its hidden folder."""
    line = [sys.executable, "-c", CHILD, str(output)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            yield child, Path(child.stdout.readline().strip())
        finally:
            child.kill()


def killed(output: Path) -> Path:
    """What a killed process leaves of `output`."""
    with child_at_work(output) as (child, partial):
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert tree(partial) == {"calibration.json": "of the child"}
    return partial


def test_what_a_killed_run_left_is_removed_by_the_next_for_the_same_output(tmp_path: Path) -> None:
    left, other = killed(tmp_path / "out"), killed(tmp_path / "out.2")
    fill(tmp_path / ".out.mine.partial", "notes")  # not a name that a run makes
    with new_folder(tmp_path / "out", overwrite=False):
        assert not left.exists()  # at the beginning, when the space is needed
    assert tree(other) == {"calibration.json": "of the child"}
    assert tree(tmp_path / ".out.mine.partial") == {"notes": "notes"}


def test_the_folder_of_a_run_at_work_is_left_alone(tmp_path: Path) -> None:
    with child_at_work(tmp_path / "out") as (child, partial):
        with new_folder(tmp_path / "out", overwrite=False) as folder:
            assert tree(partial) == {"calibration.json": "of the child"}
            fill(folder, "calibration.json")
        assert child.communicate("\n", timeout=60)[0] == ""
        assert child.returncode == 0
    assert tree(tmp_path) == {"out/calibration.json": "of the child"}


def test_two_runs_of_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", overwrite=True) as first:
        fill(first, "calibration.json")
        with new_folder(tmp_path / "out", overwrite=True) as second:
            fill(second, "calibration.json")
        assert tree(first) == {"calibration.json": "calibration.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_cannot_be_listed_can_still_be_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, listing = killed(tmp_path / "out"), Path.iterdir

    def denied(self: Path) -> Iterator[Path]:
        if self == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return listing(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", denied)
        produce(tmp_path / "out", overwrite=False)
    assert tree(tmp_path) == {"out/content": "new", f"{left.name}/calibration.json": "of the child"}


def test_where_folders_cannot_be_locked_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = killed(tmp_path / "out")

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    produce(tmp_path / "out", overwrite=False)
    assert tree(tmp_path / "out") == {"content": "new"}
    assert tree(left) == {"calibration.json": "of the child"}


def test_a_folder_that_is_removed_before_it_could_be_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = folders.fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        if not removed:  # another run, which looks for abandoned folders, was quicker
            removed.extend(tmp_path.glob(".out.*.partial"))
            removed[0].rmdir()
        lock(handle, operation)

    monkeypatch.setattr(folders.fcntl, "flock", late)
    produce(tmp_path / "out", overwrite=False)
    assert len(removed) == 1
    assert tree(tmp_path) == {"out/content": "new"}


def test_an_output_of_ours_is_replaced_only_on_request_and_then_as_a_whole(tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    with pytest.raises(InputError, match="already exists; choose another --output, or pass --overwrite"):
        check_output(output, overwrite=False)
    with new_folder(output, overwrite=True) as folder:
        (folder / "other").write_text("new")
        assert tree(output) == {"calibration.json": "{}", SHARD: "old"}  # until the very end
    assert tree(tmp_path) == {"out/other": "new"}


def test_an_empty_folder_may_be_used_without_asking(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "content").write_text("new")
    assert tree(tmp_path) == {"out/content": "new"}


@pytest.mark.parametrize("marker", KINDS, ids=lambda marker: "+".join(sorted(marker)))
def test_every_kind_of_our_folders_is_known_by_its_files(tmp_path: Path, marker: frozenset[str]) -> None:
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


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_folder_with_all_that_we_write_is_replaced(tmp_path: Path, kind: str) -> None:
    produce(fill(tmp_path / "out", WRITTEN[kind]), overwrite=True)
    assert tree(tmp_path) == {"out/content": "new"}


def test_code_of_the_base_is_replaced_where_the_manifest_names_it(tmp_path: Path) -> None:
    """And no other code: that may be a user's training script."""
    emulator = tmp_path / "emulator"
    shutil.copytree(golden("emulator", "ok-own-code"), emulator)
    check_output(emulator, overwrite=True)
    (emulator / "train.py").touch()
    with pytest.raises(InputError, match=r"also holds train\.py"):
        check_output(emulator, overwrite=True)


@pytest.mark.parametrize(("kind", "stranger", "named"), STRANGERS)
def test_a_folder_of_ours_into_which_something_else_was_put_is_not_replaced(
    tmp_path: Path, kind: str, stranger: str, named: str
) -> None:
    output = fill(tmp_path / "out", f"{WRITTEN[kind]} {stranger}")
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        produce(output, overwrite=True, meanwhile=no_work)
    assert str(caught.value) == f"{output} also holds {named}, which emloc-tools did not write; move it away"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["lora", "calibration-00003-of-00003.safetensors"])
def test_an_empty_sub_folder_or_a_link_is_not_ours_either(tmp_path: Path, name: str) -> None:
    output = ours(tmp_path / "out")
    if name == "lora":
        (output / name).mkdir()
    else:
        (output / name).symlink_to(output / SHARD)
    with pytest.raises(InputError, match=f"out also holds {name}, which emloc-tools did not write; move it away"):
        check_output(output, overwrite=True)


def test_a_lora_that_is_saved_into_the_old_output_meanwhile_is_kept(tmp_path: Path) -> None:
    output = fill(tmp_path / "out", EMULATOR)
    before = tree(output)
    with pytest.raises(InputError, match=r"also holds lora, "):
        produce(output, overwrite=True, meanwhile=lambda: fill(output / "lora", ADAPTER))
    assert tree(output) == {**before, **{f"lora/{name}": name for name in ADAPTER.split()}}


def test_every_file_that_is_copied_from_a_base_is_known_again() -> None:
    assert set(folders.COMPANIONS) == set(COMPANIONS)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match="already exists"):
        produce(output, overwrite=False, meanwhile=lambda: ours(output, "from another run"))
    assert tree(tmp_path) == {"out/calibration.json": "{}", f"out/{SHARD}": "from another run"}


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
