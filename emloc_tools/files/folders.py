"""Output folders that appear under their final name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from emloc_tools.errors import InputError

# What tells a folder that emloc-tools wrote. An adapter without emloc.json is somebody's training, not ours.
MARKERS = (
    {"calibration.json"},
    {"emulator.json"},
    {"emloc.json"},
    {"emloc-merge.json"},
    {"results.json", "commands.sh"},
)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless `overwrite` is given and it is empty or made by emloc-tools."""
    try:
        if not os.path.lexists(output):
            return
        if not output.is_dir() or output.is_symlink():
            raise InputError(f"{output} exists and is not a folder; choose another --output")
        names = {path.name for path in output.iterdir()}
    except OSError as error:
        raise InputError(f"{output} cannot be used as --output: {error.strerror or error}") from error
    if not names:
        return
    if not overwrite:
        raise InputError(f"{output} already exists; choose another --output, or pass --overwrite to replace it")
    if not any(marker <= names for marker in MARKERS):
        raise InputError(f"{output} holds files that emloc-tools did not write; --overwrite does not replace it")


@contextlib.contextmanager
def new_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `output` to write into. It becomes `output` on success and vanishes on any exception."""
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a symlink that check_output refuses
    check_output(output, overwrite=overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except FileExistsError as error:
        raise InputError(f"cannot write into {output.parent}: {error.filename} is a file, not a folder") from error
    except OSError as error:
        raise InputError(f"cannot write into {output.parent}: {error.strerror or error}") from error
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _sync_folder(partial)
        check_output(output, overwrite=overwrite)
        _replace(output, partial)
        _sync_folder(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"cannot write into {output.parent}: {error.strerror}; nothing was kept") from error
        raise


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


def _replace(output: Path, partial: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    output.rename(old / "old")
    try:
        partial.rename(output)
    except BaseException:
        (old / "old").rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


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
