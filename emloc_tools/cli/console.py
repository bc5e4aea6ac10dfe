"""What commands show: progress on stderr, results on stdout, as tables or as one JSON object."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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
from rich.table import Table

if TYPE_CHECKING:
    from emloc_tools.records import Step

WIDTH_OF_LOGS = 110  # where the output is no terminal


def stdout() -> Console:
    """Results go here."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_OF_LOGS)


def stderr() -> Console:
    """Progress and warnings go here."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def progress(*, hidden: bool) -> Iterator[Callable[[Step], None]]:
    """A callback for a stage: a bar with the time left on a terminal, ten lines per title in a log."""
    console = stderr()
    if hidden or not console.is_terminal:
        yield _silent if hidden else _tenths(console)
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
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
        print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))
    elif not quiet:
        draw(stdout())


def facts(console: Console, title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """A heading and aligned names and values."""
    console.print(f"[bold]{title}[/bold]")
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(f"  {name}", number(value))
    console.print(table)


def layer_table(console: Console, rows: Sequence[dict[str, Any]], bars: Sequence[str] = ()) -> None:
    """One line per layer; columns named in `bars` (fractions 0-1) get a small bar."""
    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column == "layer" or column in bars else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(bar(row[key]) if key in bars else number(row.get(key, "")) for key in columns))
    console.print(table)


def bar(fraction: float, width: int = 10) -> str:
    """A fraction as a bar and a number."""
    filled = round(min(max(fraction, 0.0), 1.0) * width)
    return f"{'█' * filled}{'·' * (width - filled)} {fraction:.4f}"


def number(value: Any) -> str:
    """A value for people: thousands separated, fractions to four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "; ".join(map(number, value))
    return "none" if value is None else str(value)


def size(nbytes: int) -> str:
    """Bytes in a readable unit, base 2."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def plain(value: Any) -> Any:
    """A result as JSON values: dataclasses and manifests become objects, paths strings."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _silent(step: Step) -> None:
    pass


def _tenths(console: Console) -> Callable[[Step], None]:
    shown: dict[str, int] = {}

    def show(step: Step) -> None:
        tenth = 10 * step.done // step.total
        if tenth > shown.get(step.title, 0):
            shown[step.title] = tenth
            console.print(f"{step.title}: {step.done} of {step.total}  {step.detail}", markup=False, soft_wrap=True)

    return show
