"""The beds: tasks made of real text that any machine with Python has, each with a training and a held-out part.

`far` is C headers for a base that has read Python; `near` is Python again, from other libraries than those that the
base has read; `skill` asks for the kind of a Python statement, a template with one right answer.
"""

from __future__ import annotations

import ast
import importlib.resources
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pydantic
import rich

TRAIN, HELD_OUT, VALIDATION = 400, 96, 64  # samples; choices are made on the last, scores are of the second
CHARACTERS = 420  # of a sample of Python: about 128 tokens of the bases' tokenizer


@dataclass(frozen=True)
class Bed:
    """A task, and how a LoRA is trained on it."""

    name: str
    learning_rate: float
    has_answers: bool


BEDS = {bed.name: bed for bed in (Bed("far", 6e-3, False), Bed("near", 2e-3, False), Bed("skill", 4e-3, True))}


def write(bed: str, folder: Path) -> None:
    """Write `train.jsonl`, `heldout.jsonl` and `validation.jsonl` of a bed into `folder`; the same on every run."""
    folder.mkdir(parents=True, exist_ok=True)
    if bed == "far":
        with importlib.resources.as_file(importlib.resources.files("emloc_tools.demo")) as demo:
            lines = [
                (demo / "data" / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")
                for part in ("train", "heldout")
            ]
        parts = {"train": lines[0][:TRAIN], "heldout": lines[1][:HELD_OUT], "validation": lines[0][TRAIN:][:VALIDATION]}
        for part, texts in parts.items():
            (folder / f"{part}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return
    records = list(pieces() if bed == "near" else questions())
    random.Random(0).shuffle(records)
    held_out, train, validation = records[:HELD_OUT], records[HELD_OUT:][:TRAIN], records[HELD_OUT + TRAIN :]
    for part, chosen in (("train", train), ("heldout", held_out), ("validation", validation[:VALIDATION])):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


def sources() -> Iterator[str]:
    """Python files of three libraries that this project needs anyway."""
    for library in (click, rich, pydantic):
        root = Path(library.__path__[0])
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            yield path.read_text(encoding="utf-8")


def pieces() -> Iterator[dict[str, str]]:
    """Pieces of files, cut at line ends."""
    for source in sources():
        piece = ""
        for line in source.splitlines(keepends=True):
            piece += line
            if len(piece) >= CHARACTERS:
                yield {"text": piece}
                piece = ""


def questions() -> Iterator[dict[str, str]]:
    """One-line statements and their kinds, no kind more often than another, no statement twice."""
    kinds: dict[str, list[str]] = {}
    for source in sources():
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.stmt) and node.lineno == node.end_lineno and len(lines[node.lineno - 1]) < 100:
                statements = kinds.setdefault(type(node).__name__.lower(), [])
                if (statement := lines[node.lineno - 1].strip()) not in statements:
                    statements.append(statement)
    usual = {kind: statements for kind, statements in kinds.items() if len(statements) >= 60}
    for kind, statements in sorted(usual.items()):
        for statement in random.Random(kind).sample(statements, 60):
            yield {"prompt": f"{statement}\n# kind of statement:", "completion": f" {kind}\n"}


def remove(folder: Path) -> None:
    """Delete a bed's files."""
    shutil.rmtree(folder, ignore_errors=True)
