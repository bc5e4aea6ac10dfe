"""The drawing itself: tables, facts, bars, progress and JSON of any result."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from emloc_tools.cli import console
from emloc_tools.records import Step

LONG = (
    "model.language_model.layers.10.self_attn.a_rather_long_name_of_a_projection_that_no_terminal_has_room_for_q_proj"
)


def paper(width: int = 80, encoding: str = "utf-8") -> Console:
    """A console that writes into memory."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(file=file, width=width, highlight=False, emoji=False)


def text(of: Console) -> str:
    """What was written."""
    of.file.seek(0)
    return of.file.read()


@pytest.mark.parametrize("width", [20, 80, 110])
def test_a_table_keeps_every_name_whole_and_its_columns_aligned(width: int) -> None:
    out = paper(width)
    console.layer_table(out, [{"layer": LONG, "rank": 5}, {"layer": "short", "rank": 12345, "scaling": 0.25}])
    lines = text(out).splitlines()
    assert lines == [
        f"{'layer':<{len(LONG)}}    rank  scaling",
        f"{LONG}       5",
        f"{'short':<{len(LONG)}}  12,345    0.250",
    ]


def test_brackets_in_names_are_shown_as_they_are() -> None:
    out = paper()
    console.facts(out, "[bold]x", [("path", "runs[1]/[red]a")])
    console.layer_table(out, [{"layer": "[dim]x", "rank": 1}])
    console.line(out, "All: inspect [link]")
    console.in_tenths(out)(Step("build", 1, 1, "[red]layer"))
    assert "[bold]x" in text(out)
    assert "runs[1]/[red]a" in text(out)
    assert "[dim]x" in text(out)
    assert "All: inspect [link]" in text(out)
    assert "[red]layer" in text(out)


def test_facts_wrap_between_words_under_their_value_but_never_a_command() -> None:
    out, command = paper(40), f"emloc-tools inspect {'folder/' * 12}"
    console.facts(out, "Title", [("short", "one two three four five six seven"), ("next", console.Verbatim(command))])
    assert text(out).splitlines() == [
        "Title",
        "  short  one two three four five six",
        "         seven",
        f"  next   {command}",
    ]


def test_a_list_of_facts_gets_a_line_each() -> None:
    out = paper()
    console.facts(out, "Title", [("data", ["a.jsonl", "b.jsonl"]), ("layers", 1234), ("none", [])])
    assert text(out).splitlines()[1:] == ["  data    a.jsonl", "          b.jsonl", "  layers  1,234", "  none    none"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "·········· 0.000"),
        (1e-5, "·········· <0.001"),
        (0.04, "▍········· 0.040"),
        (0.46, "████▋····· 0.460"),
        (0.999, "██████████ 0.999"),
        (1.0, "██████████ 1.000"),
    ],
)
def test_bars_have_a_number_of_three_decimals(value: float, shown: str) -> None:
    assert console.bar(value) == shown


def test_bars_are_plain_where_the_output_is_not_unicode() -> None:
    out = paper(encoding="ascii")
    console.layer_table(out, [{"layer": "a", "error": 0.5}], bars=["error"])
    assert "#####..... 0.500" in text(out)


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (24 * 2**30, "24.0 GiB"), (3 * 2**40, "3.0 TiB")],
)
def test_sizes_are_in_powers_of_1024(nbytes: int, shown: str) -> None:
    assert console.size(nbytes) == shown


def test_any_result_becomes_json() -> None:
    @dataclass(frozen=True)
    class Inner:
        rank: int

    @dataclass(frozen=True)
    class Outer:
        path: Path
        layers: dict[str, Inner]
        names: tuple[str, ...]

    value = console.plain(Outer(Path("a/b"), {"x": Inner(3)}, ("y",)))
    assert json.loads(json.dumps(value)) == {"path": "a/b", "layers": {"x": {"rank": 3}}, "names": ["y"]}


def test_progress_in_a_log_is_a_line_per_tenth_and_title() -> None:
    out = paper()
    show = console.in_tenths(out)
    for title in ("ranks", "factors"):
        for done in range(1, 1001):
            show(Step(title, done, 1000, f"layer {done}"))
    lines = text(out).splitlines()
    assert lines == [
        f"{title}: {done} of 1000  layer {done}" for title in ("ranks", "factors") for done in range(100, 1001, 100)
    ]


def test_progress_on_a_terminal_is_a_bar_with_the_detail(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(console, "stderr", lambda: out)
    with console.progress(hidden=False) as progress:
        progress(Step("factors", 1, 2, "layer [a]"))
        progress(Step("factors", 2, 2, "layer [b]"))
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "factors" in shown
    assert "2/2" in shown
    assert "layer [b]" in shown
