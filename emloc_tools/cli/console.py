"""What commands show: progress on stderr, results on stdout, as tables or as one JSON object."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from emloc_tools.wording import fraction as fraction  # so spelt they are of this module, too
from emloc_tools.wording import number as number
from emloc_tools.wording import plain as plain
from emloc_tools.wording import size as size

if TYPE_CHECKING:
    from emloc_tools.records import Step

EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
WIDTH_OF_LOGS = 110  # where the output is no terminal
CORRECTION = "‖D‖/‖sB'‖"  # size of a correction, relative to the trained update


class Verbatim(str):
    """A value that is never wrapped, such as a command line to copy."""


def stdout() -> Console:
    """Results go here."""
    return _console()


def stderr() -> Console:
    """Progress and warnings go here."""
    return _console(stderr=True)


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a name or sign that it cannot show is no reason to fail
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_LOGS
    return console


@contextlib.contextmanager
def progress(*, hidden: bool) -> Iterator[Callable[[Step], None]]:
    """A callback for a stage: a bar with the time left on a terminal, ten lines per title in a log."""
    console = stderr()
    if hidden or not console.is_terminal:
        yield _silent if hidden else in_tenths(console)
        return
    columns = (
        TextColumn("{task.description:<9}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(step: Step) -> None:
            if step.title not in tasks:
                tasks[step.title] = bar.add_task(step.title, total=step.total, detail="")
            bar.update(tasks[step.title], completed=step.done, detail=step.detail)

        yield show


def emit(value: Any, *, as_json: bool, quiet: bool, draw: Callable[[Console], None]) -> None:
    """Print a stage's result: as JSON if asked for, else drawn, else not at all."""
    if as_json:
        print(json.dumps(plain(value), allow_nan=False))
    elif not quiet:
        draw(stdout())


def warn(message: str, *, hidden: bool = False) -> None:
    """One line on stderr about a result that is complete but not what one would wish for."""
    if not hidden:
        line(stderr(), f"Warning: {' '.join(message.split())}")


def line(console: Console, text: str) -> None:
    """A line as it is: never wrapped, and brackets in a path are no markup."""
    console.print(text, soft_wrap=True, markup=False)


def heading(console: Console, title: str) -> None:
    """A line in bold."""
    console.print(Text(title, style="bold"), soft_wrap=True)


def facts(console: Console, title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """A heading and aligned names and values. Values are wrapped between words, but for a `Verbatim`."""
    heading(console, title)
    indent = max((len(name) for name, _ in rows), default=0) + 4
    for name, value in rows:
        text = "\n".join(_lines(value, console.width - indent))
        line(console, f"  {name:<{indent - 2}}{text}".replace("\n", "\n" + " " * indent))


def _lines(value: Any, width: int) -> list[str]:
    if isinstance(value, Verbatim):
        return [value]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _lines(item, width)] or ["none"]
    return textwrap.wrap(number(value), max(width, 20), break_long_words=False, break_on_hyphens=False) or [""]


def layer_table(
    console: Console, rows: Sequence[dict[str, Any]], bars: Sequence[str] = (), to_right: Sequence[str] = ()
) -> None:
    """One line per row, never cut or wrapped; columns named in `bars` (fractions 0-1) get a small bar.

    Texts are aligned to the left, numbers and the columns named in `to_right` to the right.
    """
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    unicode = console.encoding.lower().startswith("utf")
    cells = [[_cell(row.get(key), key in bars, unicode) for key in columns] for row in rows]
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    left = [
        key in bars or (key not in to_right and all(isinstance(row.get(key), str) for row in rows)) for key in columns
    ]
    for row in [columns, *cells]:
        aligned = (
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        )
        console.print(Text("  ".join(aligned).rstrip(), style="bold" if row is columns else ""), soft_wrap=True)


def _cell(value: Any, as_bar: bool, unicode: bool) -> str:
    if value is None:
        return ""
    if as_bar:
        return bar(float(value), unicode=unicode)
    return fraction(value) if isinstance(value, float) else number(value)


def bar(value: float, width: int = 10, *, unicode: bool = True) -> str:
    """A fraction as a bar, to an eighth of a character where there are such characters, and a number."""
    return f"{plain_bar(value, width, unicode=unicode)} {fraction(value)}"


def plain_bar(value: float, width: int, *, unicode: bool = True) -> str:
    """A fraction as a bar alone."""
    part = min(max(value, 0.0), 1.0) * width
    if not unicode:
        return "#" * round(part) + "." * (width - round(part))
    eighths = round(8 * part)
    filled = "█" * (eighths // 8) + EIGHTHS[eighths % 8]
    return filled + "·" * (width - len(filled))


def _silent(step: Step) -> None:
    pass


def in_tenths(console: Console) -> Callable[[Step], None]:
    shown: dict[str, int] = {}

    def show(step: Step) -> None:
        tenth = 10 * step.done // max(step.total, 1)
        if tenth > shown.get(step.title, 0):
            shown[step.title] = tenth
            line(console, f"{step.title}: {step.done} of {step.total}  {step.detail}".rstrip())

    return show
