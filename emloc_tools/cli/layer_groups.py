"""How `inspect` shows layers: by kinds, a line per block, and one line for blocks of which all is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from emloc_tools.cli import console

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]

NAMES = {"correction": console.CORRECTION, "parameters": "parameters each"}
BARS = ("of_full_rank", "relative_error", "correction")
WORDS = (*BARS, "statistics", "gradients")  # columns that are aligned to the left
IN_HEADING = ("layer", "out", "in")  # what a kind's heading says, where all of its layers agree
WIDTHS = (20, 10, 6)  # of bars: the first with which the table fits, else the last


@dataclass(frozen=True)
class _Line:
    """One or several blocks and their common values; or a kind's heading, without values."""

    label: str
    row: Row | None


def draw(out: Console, rows: Sequence[Row]) -> None:
    """The layers of `rows`, which are those of an inspection, kind by kind in every row of blocks."""
    from emloc_tools.reporting.kinds import grids

    by_name = {row["layer"]: _with_rank(row) for row in rows}
    largest = max((row["correction"] for row in rows if "correction" in row), default=0.0) or 1.0
    for place, grid in enumerate(grids(by_name)):
        if place:
            out.print()
        console.heading(out, f"Layers in {grid.blocks}" if grid.blocks else "Layers outside of blocks")
        lines: list[_Line] = []
        for kind in grid.kinds:
            of_kind = {depth: by_name[name] for (depth, other), name in grid.names.items() if other == kind}
            lines += _kind(kind, of_kind)
        _table(out, lines, largest)


def _with_rank(row: Row) -> Row:
    """A row with the rank as a part of the largest that a layer of its shape can have, after the rank itself."""
    if not {"out", "in", "rank"} <= row.keys():
        return row
    keys = list(row)
    place = keys.index("rank") + 1
    part = {"of_full_rank": row["rank"] / min(row["out"], row["in"])}
    return {key: row[key] for key in keys[:place]} | part | {key: row[key] for key in keys[place:]}


def _kind(kind: str, rows: dict[tuple[int, ...], Row]) -> Iterator[_Line]:
    """The heading of a kind, with the shape that its layers have, and lines for its blocks."""
    shapes = {(row["out"], row["in"]) for row in rows.values() if "out" in row}
    agreed = len(shapes) <= 1
    shape = "".join(f"  {out:,} x {in_:,}" for out, in_ in shapes) if agreed else ""
    yield _Line(f"{kind}{shape}", None)
    hidden = IN_HEADING if agreed else IN_HEADING[:1]
    runs: list[tuple[list[tuple[int, ...]], Row]] = []
    for depth in sorted(rows):
        values = {key: value for key, value in rows[depth].items() if key not in hidden}
        if runs and runs[-1][1] == values and _follows(depth, runs[-1][0][-1]):
            runs[-1][0].append(depth)
        else:
            runs.append(([depth], values))
    yield from (_Line(_blocks(depths), values) for depths, values in runs)


def _follows(depth: tuple[int, ...], before: tuple[int, ...]) -> bool:
    return depth[:-1] == before[:-1] and depth[-1] == before[-1] + 1


def _blocks(depths: list[tuple[int, ...]]) -> str:
    """A block, or the first and the last of several."""
    from emloc_tools.reporting.kinds import depth_text

    first, last = depth_text(depths[0]), depth_text(depths[-1])
    return first if len(depths) == 1 else f"{first}-{last}"


def _table(out: Console, lines: Sequence[_Line], largest: float) -> None:
    """The lines with their columns aligned over all kinds, and a row of headings."""
    keys = list(dict.fromkeys(key for line in lines for key in line.row or {}))
    headings = ["block", *(NAMES.get(key, key.replace("_", " ")) for key in keys)]
    unicode = out.encoding.lower().startswith("utf")
    for bars in WIDTHS:
        cells = [
            [line.label, *(_cell(key, line.row, bars, unicode, largest) for key in keys)]
            for line in lines
            if line.row is not None
        ]
        widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
        if 2 + sum(widths) + 2 * len(keys) <= out.width:
            break
    out.print(Text(_aligned(headings, widths, keys), style="bold"), soft_wrap=True)
    following = iter(cells)
    for line in lines:
        if line.row is None:
            out.print(Text(line.label, style="bold"), soft_wrap=True)
        else:
            text = Text(_aligned(next(following), widths, keys))
            text.highlight_regex("[█▉▊▋▌▍▎▏]+", "cyan")
            out.print(text, soft_wrap=True)


def _cell(key: str, row: Row | None, bars: int, unicode: bool, largest: float) -> str:
    value = (row or {}).get(key)
    if value is None:
        return ""
    if key in BARS:
        part = value / largest if key == "correction" else value
        return f"{console.plain_bar(part, bars, unicode=unicode)} {console.fraction(value)}"
    return console.fraction(value) if isinstance(value, float) else console.number(value)


def _aligned(cells: Sequence[str], widths: Sequence[int], keys: Sequence[str]) -> str:
    """A line: words and bars to the left, numbers to the right."""
    parts = [f"{cells[0]:>{widths[0]}}"]
    for key, cell, width in zip(keys, cells[1:], widths[1:], strict=True):
        parts.append(f"{cell:<{width}}" if key in WORDS else f"{cell:>{width}}")
    return ("  " + "  ".join(parts)).rstrip()
