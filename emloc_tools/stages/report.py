"""report: one page, or a file for programs, of what our folders hold and how they were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emloc_tools.errors import InputError
from emloc_tools.files.single import check_file, write_file
from emloc_tools.records import Progress, silent
from emloc_tools.reporting.collecting import collect
from emloc_tools.reporting.markdown import markdown
from emloc_tools.reporting.page import page
from emloc_tools.reporting.svg import require_matplotlib
from emloc_tools.wording import plain

Format = Literal["html", "json", "md"]
ENDINGS: dict[str, Format] = {".html": "html", ".htm": "html", ".json": "json", ".md": "md"}


@dataclass(frozen=True)
class WrittenReport:
    """The file, its format, and how many folders, sets of losses and plans it reports on; its size in bytes."""

    output: Path
    format: Format
    folders: int
    losses: int
    plans: int
    nbytes: int


def report(
    paths: Sequence[Path],
    *,
    output: Path,
    format: Format | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> WrittenReport:
    """Write a report on `paths`: our folders, LoRAs, bases, plans, the JSON of `evaluate`, or folders of these.

    `format` is told by the ending of `output` if it is not given. Of weights only S of emulators and the values of
    LoRAs are read. Raises `InputError` for paths with nothing to report on, `FormatError` for damaged ones, and
    `UnsupportedError` for HTML without matplotlib.
    """
    form = ENDINGS.get(output.suffix.lower()) if format is None else format
    if form is None:
        raise InputError(f"{output} has none of the endings {', '.join(ENDINGS)}; give one, or pass --format")
    check_file(output, "--output", overwrite=overwrite)
    if form == "html":
        require_matplotlib()
    found = collect(paths, progress=progress)
    title = f"Report on {', '.join(path.absolute().name for path in paths)}"
    match form:
        case "html":
            text = page(found, title=title, progress=progress)
        case "md":
            text = markdown(found, title=title)
        case "json":
            text = json.dumps(plain(found), indent=2, allow_nan=False) + "\n"
    # Names of files that are no UTF-8 cannot be written as such.
    text = text.encode("utf-8", "replace").decode("utf-8")
    write_file(output, text)
    counts = (len(found.subjects), len(found.losses), len(found.plans))
    return WrittenReport(output, form, *counts, len(text.encode()))
