"""inspect's table of layers: kinds, blocks, bars that say their numbers, any width, and escapes where they belong."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from emloc_tools.cli import layer_groups
from tests.cli.conftest import Invoke
from tests.conftest import Run
from tests.stages.reference import read_json

PARTS = {symbol: eighths for eighths, symbol in enumerate("·▏▎▍▌▋▊▉█")}


def drawn(rows: list[dict[str, Any]], *, width: int = 60, encoding: str = "utf-8", terminal: bool = False) -> str:
    """The table on a console that writes into memory."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    layer_groups.draw(Console(file=file, width=width, force_terminal=terminal, highlight=False), rows)
    file.seek(0)
    return file.read()


def layer(block: int, kind: str = "q", **values: Any) -> dict[str, Any]:
    """A row of an inspection."""
    return {"layer": f"m.{block}.{kind}", **values}


def emulated(block: int, error: float, rank: int = 4) -> dict[str, Any]:
    """A row of an emulator."""
    return layer(block, out=16, **{"in": 8}, rank=rank, relative_error=error)


def test_every_layer_of_an_emulator_is_under_its_kind_with_its_rank_and_error(run: Run, invoke: Invoke) -> None:
    text = invoke("inspect", run.emulator).stdout.partition("Layers in model.layers.*\n")[2].partition("\n\n")[0]
    found, kind = {}, ""
    for line in text.splitlines()[1:]:
        if not line.startswith(" "):
            kind, _, shape = line.partition("  ")
        else:
            block, rank, _, part, _, error = line.split()
            found[f"model.layers.{block}.{kind}"] = (shape, rank, part, error)
    layers = read_json(run.emulator / "emulator.json")["layers"]
    assert found == {
        name: (
            f"{record['out_features']} x {record['in_features']}",
            str(record["rank"]),
            f"{record['rank'] / min(record['out_features'], record['in_features']):.3f}",
            f"{record['relative_error']:.3f}",
        )
        for name, record in layers.items()
    }


def test_bars_are_as_long_as_their_numbers() -> None:
    """To an eighth of a character."""
    errors = [0.0, 0.013, 0.25, 0.5001, 0.99, 1.0]
    lines = drawn([emulated(block, error) for block, error in enumerate(errors)]).splitlines()[3:]
    bars = [line.split()[4] for line in lines]
    for bar, error in zip(bars, errors, strict=True):
        assert len(bar) == 10
        assert sum(PARTS[symbol] for symbol in bar) == round(80 * error)
    assert all(line.split()[2] == "█████·····" for line in lines)  # rank 4 of 8


def test_blocks_of_which_all_is_the_same_share_a_line() -> None:
    same = {"statistics": "input", "tokens": 7}
    rows = [layer(block, **same) for block in (0, 1, 2, 4, 5)] + [layer(6, **{**same, "tokens": 8})]
    assert [line.split() for line in drawn(rows).splitlines()[2:]] == [
        ["q"], ["0-2", "input", "7"], ["4-5", "input", "7"], ["6", "input", "8"],
    ]  # fmt: skip


def test_layers_of_a_kind_with_different_shapes_show_them_one_by_one() -> None:
    rows = [emulated(0, 0.1), {**emulated(1, 0.1), "out": 32}]
    lines = drawn(rows).splitlines()
    assert lines[2] == "q"
    assert [line.split()[:3] for line in lines[3:]] == [["0", "16", "8"], ["1", "32", "8"]]


@pytest.mark.parametrize(("width", "bar"), [(45, 6), (60, 10), (80, 20), (120, 20)])
def test_bars_are_as_wide_as_the_terminal_has_room_for(width: int, bar: int) -> None:
    lines = drawn([emulated(0, 0.3), emulated(1, 0.6)], width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert {len(part) for line in lines[3:] for part in line.split() if part[0] in PARTS} == {bar}


def test_corrections_are_compared_with_the_largest() -> None:
    lines = drawn([layer(0, rank=4, correction=0.5), layer(1, rank=4, correction=2.0)], width=40).splitlines()
    assert lines[3].split()[2:] == ["██▌·······", "0.500"]
    assert lines[4].split()[2:] == ["██████████", "2.000"]


def test_an_output_that_is_no_unicode_gets_plain_bars() -> None:
    assert "#####..... 0.500" in drawn([emulated(0, 0.5)], encoding="ascii")


@pytest.mark.parametrize(
    ("terminal", "no_color", "colours", "styles"),
    [(False, False, 0, 0), (True, False, 1, 1), (True, True, 0, 1)],
)
def test_colours_are_for_terminals_that_want_them(
    terminal: bool, no_color: bool, colours: int, styles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    text = drawn([emulated(0, 0.5)], terminal=terminal)
    codes = re.findall(r"\x1b\[([\d;]+)m", text)
    assert bool([code for code in codes if re.search(r"(^|;)(3\d|38;.*)$", code)]) == bool(colours)
    assert bool([code for code in codes if code == "1"]) == bool(styles)
    plain = drawn([emulated(0, 0.5)])
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == plain


def test_brackets_in_a_layers_name_are_no_markup() -> None:
    assert "[red]x" in drawn([{"layer": "m.0.[red]x", "rank": 1}])
