"""Opening the files of an artifact: regular files only, and only inside the artifact's folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from emloc_tools.errors import FormatError


def open_regular(path: Path, rule: str) -> BinaryIO:
    """Open a file for reading, unbuffered. Reading a pipe or a device could wait for ever, so they are refused.

    Whatever prevents it is a `FormatError` of `rule`.
    """
    try:
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    except (OSError, ValueError) as error:
        raise FormatError(rule, path, "", f"cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FormatError(rule, path, "", "is not a regular file")
    return file


def path_inside(folder: Path, name: str, rule: str) -> Path | None:
    """The path of an artifact's file `name`, None if there is none; a `FormatError` of `rule` if a link leads outside.

    The Hub's cache is the exception: there every file of `<repository>/snapshots/<commit>/` is a link into
    `<repository>/blobs/`.
    """
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise FormatError(rule, path, "", f"cannot be read: {reason(error)}") from error
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not (target.is_relative_to(home) or cached):
        raise FormatError(rule, path, "", "is a link that leads out of its folder")
    return path


def file_inside(folder: Path, name: str, rule: str) -> Path:
    """`path_inside` for a file that must be there."""
    path = path_inside(folder, name, rule)
    if path is None:
        raise FormatError(rule, folder / name, "", "does not exist")
    return path


def reason(error: Exception) -> str:
    """What the operating system says of an error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
