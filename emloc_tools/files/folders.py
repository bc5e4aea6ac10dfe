"""Output folders that appear under their final name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from emloc_tools.errors import EmlocError, InputError

# The names that emloc-tools writes into its folders: what is called otherwise is somebody else's, and is not deleted.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")  # copied from the base
CALIBRATION = ("calibration.json", "calibration-*.safetensors")
WEIGHTS = tuple(
    f"{stem}{part}.safetensors" for stem in ("model", "diffusion_pytorch_model") for part in ("", "-*-of-*")
)
MODEL = (*WEIGHTS, "README.md", *COMPANIONS)
EMULATOR = (*MODEL, "modeling_*.py", "__pycache__/*.pyc")  # loading may leave the last beside the code
ADAPTER = (
    *("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
    *("emloc.json", "emloc-verify.json"),
)
DEMO = (
    *("results.json", "commands.sh", "train_lora.py", "data/README.md", "data/*.jsonl"),
    *(f"base/{name}" for name in MODEL),
    *(f"calibration/{name}" for name in CALIBRATION),
    *(f"emulator-*/{name}" for name in EMULATOR),
    *(f"lora-*/{name}" for name in (*ADAPTER, "README.md", "training.json")),
    *(f"{kind}-*/{name}" for kind in ("corrected", "refined") for name in ADAPTER),
)

# Which files mark a folder as one of ours, and what such a folder may hold. An adapter with neither of emloc.json
# and emloc-verify.json is somebody's training, not ours.
KINDS = {
    frozenset({"inputs.safetensors"}): ("inputs.safetensors",),
    frozenset({"calibration.json"}): CALIBRATION,
    frozenset({"emulator.json"}): EMULATOR,
    frozenset({"emloc.json"}): ADAPTER,
    frozenset({"emloc-verify.json"}): ADAPTER,
    frozenset({"emloc-merge.json"}): (*MODEL, "*.py", "__pycache__/*.pyc"),
    frozenset({"emloc-head.json"}): MODEL,
    frozenset({"emloc-export.json"}): MODEL,
    frozenset({"results.json", "commands.sh"}): DEMO,
}


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is empty, or `overwrite` is given and all it holds is of emloc-tools.

    That is told by the names: a file, link or sub-folder that its kind of folder does not have is refused.
    """
    try:
        if not os.path.lexists(output):
            return
        if not output.is_dir() or output.is_symlink():
            raise InputError(f"{output} exists and is not a folder; choose another --output")
        names = {path.name for path in output.iterdir()}
        if not names:
            return
        if not overwrite:
            raise InputError(f"{output} already exists; choose another --output, or pass --overwrite to replace it")
        patterns = [pattern for marker, kind in KINDS.items() if marker <= names for pattern in kind]
        if not patterns:
            raise InputError(f"{output} holds files that emloc-tools did not write; --overwrite does not replace it")
        stranger = _stranger(output, [*patterns, *_code_of_base(output)])
    except OSError as error:
        raise InputError(f"{output} cannot be used as --output: {error.strerror or error}") from error
    if stranger is not None:
        raise InputError(f"{output} also holds {stranger}, which emloc-tools did not write; move it away")


def _code_of_base(folder: Path) -> list[str]:
    """The Python files of the base that an emulator's manifest names; none where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        code = json.loads((folder / "emulator.json").read_text(encoding="utf-8")).get("code", {})
        return [name for name in code if re.fullmatch(r"\w+\.py", name)]
    return []


def _stranger(folder: Path, patterns: list[str]) -> str | None:
    """The first file, link or sub-folder, as a path below `folder`, that no pattern allows."""
    parents = {str(parent) for pattern in patterns for parent in PurePosixPath(pattern).parents} - {"."}
    for path in sorted(folder.rglob("*")):
        is_folder = path.is_dir() and not path.is_symlink()
        # Both sides begin with "/", so that a pattern has to match from the first part to the last.
        name = PurePosixPath("/", path.relative_to(folder))
        known = any(name.match(f"/{pattern}") for pattern in (parents if is_folder else patterns))
        if path.is_symlink() or not known:
            return str(name.relative_to("/"))
    return None


@contextlib.contextmanager
def new_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `output` to write into. It becomes `output` on success and vanishes on any exception.

    Everything in it is forced to disk before it gets its name. A process that is killed leaves the hidden folder
    behind, and the next run for the same output removes it. What tells such a folder from one at work, also in another
    process, is a lock on the folder, which ends with its process. Where a file system cannot lock folders nothing is
    removed. A file system that keeps locks to each machine must not get the same output from two of them at once.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a symlink that check_output refuses
    check_output(output, overwrite=overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        partial, lock = _locked_partial(output)
    except FileExistsError as error:
        raise InputError(f"cannot write into {output.parent}: {error.filename} is a file, not a folder") from error
    except OSError as error:
        raise InputError(f"cannot write into {output.parent}: {error.strerror or error}") from error
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _sync_tree(partial)
        check_output(output, overwrite=overwrite)
        _replace(output, partial)
        _sync_folder(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"cannot write into {output.parent}: {error.strerror}; nothing was kept") from error
        raise
    finally:
        os.close(lock)


def require_folder(path: Path, what: str) -> None:
    """Refuse a path that is not a folder, naming what was expected there."""
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {found}; expected the folder of {what}")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, keys in the given order, forced to disk.

    Bytes of a file name or command line that were no UTF-8 become question marks: JSON has no way to hold them.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, forced to disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _locked_partial(output: Path) -> tuple[Path, int]:
    """A new hidden folder for `output`, and the open handle that holds its lock."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(partial, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # not every file system can; then no run removes another's folder
                    fcntl.flock(handle, fcntl.LOCK_EX)
                # Between creation and lock another run may have taken the folder for an abandoned one.
                if os.path.samestat(os.fstat(handle), partial.stat()):
                    return partial, handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)


def _remove_abandoned(output: Path) -> None:
    """Remove the hidden folders of runs for `output` that were killed: those whose lock nobody holds."""
    ours = re.compile(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}\.partial")  # eight characters are from mkdtemp
    found: list[Path] = []
    with contextlib.suppress(OSError):  # one may be allowed to write into a folder but not to list it
        found = [path for path in output.parent.iterdir() if ours.fullmatch(path.name)]
    for path in found:
        with contextlib.suppress(OSError):  # held by a living run, gone meanwhile, another user's, or not to be locked
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _replace(output: Path, partial: Path) -> None:
    """Give `partial` the name `output`. What bore it is deleted only then, put back on failure, and never lost.

    Raises `EmlocError` that says where it is kept, if it cannot be put back either.
    """
    if not output.exists():
        partial.rename(output)
        return
    holder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    backup = holder / "old"
    try:
        output.rename(backup)
        partial.rename(output)
    except BaseException as error:
        if partial.exists():  # else the interruption came after the last rename
            _restore(output, backup, error)
            with contextlib.suppress(OSError):
                holder.rmdir()
        else:
            shutil.rmtree(holder, ignore_errors=True)
        raise
    shutil.rmtree(holder, ignore_errors=True)


def _restore(output: Path, backup: Path, cause: BaseException) -> None:
    """Put a backup back under its name, if it was moved away at all."""
    if not os.path.lexists(backup):
        return
    try:
        backup.rename(output)
    except OSError as error:
        raise EmlocError(
            f"cannot write {output}: {str(cause) or type(cause).__name__}; what it held before could not be put back "
            f"({error.strerror or error}) and is kept in {backup}"
        ) from cause


def _sync_tree(root: Path) -> None:
    """Make every file and folder below `root`, and its own entries, durable, whoever wrote them."""
    for path in [*root.rglob("*"), root]:
        if path.is_dir():
            _sync_folder(path)
        elif path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _sync_folder(path: Path) -> None:
    """Make the folder's entries durable; not every system can open a folder, then there is nothing to do."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
