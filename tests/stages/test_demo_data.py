"""demo: what it makes of the user's data, and what it refuses before it runs anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emloc_tools.errors import InputError
from emloc_tools.stages.demo import demo
from tests import pico
from tests.stages.demo_commands import Commands, lines_of
from tests.stages.reference import contents


@pytest.fixture
def base(tmp_path: Path) -> str:
    """What stands for a base where no command runs."""
    (tmp_path / "base").mkdir()
    return str(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pico.save_texts(tmp_path / "mine.jsonl", 25)


def test_a_tenth_is_held_out_and_is_the_same_every_time(
    base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Commands(monkeypatch)
    before = lines_of(data)
    parts = []
    for name in ("one", "two"):
        demo(output=tmp_path / name, base=base, data=data, ratios=[0.5])
        parts.append([lines_of(tmp_path / name / "data" / f"{part}.jsonl") for part in ("train", "heldout")])
    assert parts[0] == parts[1]
    train, held_out = parts[0]
    assert len(held_out) == len(before) // 10
    assert sorted(train + held_out) == sorted(before)
    assert [line for line in before if line in train] == train  # in the order of the file
    assert [line for line in before if line in held_out] == held_out


def test_only_a_line_feed_ends_a_line(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON allows U+2028 and U+0085 inside a string, where `str.splitlines` would cut it."""
    Commands(monkeypatch)
    lines = [json.dumps({"text": f"{number}\u2028a\x85b"}, ensure_ascii=False) for number in range(20)]
    assert len("\n".join(lines).splitlines()) == 60
    (tmp_path / "mine.jsonl").write_text("\n\n".join(lines) + "\n \n", encoding="utf-8")
    demo(output=tmp_path / "out", base=base, data=tmp_path / "mine.jsonl", ratios=[0.5])
    found = [lines_of(tmp_path / "out" / "data" / f"{part}.jsonl") for part in ("train", "heldout")]
    assert [len(part) for part in found] == [18, 2]
    assert sorted(found[0] + found[1]) == sorted(lines)


def refuse(message: str, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Refused before any command, and nothing left."""
    commands = Commands(monkeypatch)
    before = set(output.parent.iterdir())
    with pytest.raises(InputError, match=message):
        demo(output=output, **options)
    assert commands.lines == []
    assert set(output.parent.iterdir()) == before


def test_base_and_data_go_together(base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ({"base": base}, {"data": data}):
        refuse("--base and --data go together", tmp_path / "out", monkeypatch, **given)


@pytest.mark.parametrize("ratios", [[], [0.5, 0.1, 0.5]])
def test_ratios_must_differ(
    ratios: list[float], base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse("one or several different ratios", tmp_path / "out", monkeypatch, base=base, data=data, ratios=ratios)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("few.jsonl", b'{"text": "a"}\n' * 19 + b"\n  \n", r"holds 19 samples; the demo needs 20 or more"),
        ("latin.jsonl", b'{"text": "a"}\n' * 20 + b'{"text": "\xe9"}\n', r"not UTF-8: .* at byte 290"),
        ("ready.safetensors", b"", r"the demo needs JSONL"),
        (".", b"", r"the demo needs JSONL"),
        ("absent.jsonl", b"", r"the demo needs JSONL"),
    ],
)
def test_data_that_cannot_be_split_are_refused(
    name: str, content: bytes, message: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if name not in (".", "absent.jsonl"):
        path.write_bytes(content)
    refuse(message, tmp_path / "out", monkeypatch, base=base, data=path)


@pytest.mark.parametrize("place", ["base", "data"])
def test_what_an_earlier_run_left_is_not_replaced_while_it_is_read(
    place: str, base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Commands(monkeypatch)
    demo(output=tmp_path / "out", ratios=[0.5])
    before = contents(tmp_path / "out" / "data"), contents(tmp_path / "out" / "base")
    inputs = {"base": base, "data": data}
    inputs[place] = {"base": str(tmp_path / "out" / "base"), "data": tmp_path / "out" / "data" / "train.jsonl"}[place]
    refuse("would replace the input", tmp_path / "out", monkeypatch, **inputs, overwrite=True)
    assert (contents(tmp_path / "out" / "data"), contents(tmp_path / "out" / "base")) == before


def test_a_base_in_the_home_is_found_by_the_commands(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    Commands(monkeypatch)
    assert demo(output=tmp_path / "out", base="~/model", data=data, ratios=[0.5]).base == str(tmp_path / "model")
    with pytest.raises(InputError, match="would replace the input ~/model"):
        demo(output=tmp_path / "model", base="~/model", data=data, overwrite=True)
