"""Single files that appear under their final name only when they are complete."""

from __future__ import annotations

import os
from pathlib import Path

from emloc_tools.errors import InputError


def check_file(path: Path, option: str, *, overwrite: bool) -> None:
    """Refuse, as the value of `option`, a file that exists, unless `overwrite` is given, or cannot be written there."""
    if os.path.lexists(path) and not (overwrite and path.is_file()):
        remedy = f"choose another {option}" + (", or replace it by --overwrite" if path.is_file() else "")
        raise InputError(f"{path} exists{'' if path.is_file() else ' and is no file'}; {remedy}")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder; {option} takes a file in an existing one")


def write_file(path: Path, text: str) -> None:
    """Write a UTF-8 text file beside its place, force it to disk, and give it its name, replacing what bore it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
