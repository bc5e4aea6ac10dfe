"""JSONL data files: one JSON object a line, of which only the chosen ones are parsed."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from emloc_tools.errors import InputError
from emloc_tools.models.source import first_line

Line = tuple[int, int]  # a line's number, from 1, and its byte offset
Item = TypeVar("Item")


def lines_of(path: Path) -> Iterator[Line]:
    """Every line of the file that is not blank."""
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, start
            start += len(line)


def choose(items: list[Item], count: int | None, seed: int) -> list[Item]:
    """`count` of the items by `seed`, in their order; all of them if there are no more, or for None."""
    if count is None or count >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]


def read_records(path: Path, lines: Sequence[Line]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects on the given lines, with their numbers. Raises `InputError` for what is no JSON object."""
    with path.open("rb") as file:
        for number, start in lines:
            file.seek(start)
            try:
                record = json.loads(file.readline().decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: {type(record).__name__} found, expected a JSON object")
            yield number, record


@contextlib.contextmanager
def blaming_line(path: Path, number: int) -> Iterator[None]:
    """Turn a complaint about a record into an `InputError` that names its file and line."""
    try:
        yield
    except (InputError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}:{number}: {first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):
            raise InputError(f"{path}:{number}: the chat template refuses the messages: {error}") from error
        raise
