"""What of recorded names may be shown to others: names of models as they are, of local paths only the last part."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from emloc_tools.files.manifest import BaseRecord

LOCAL = re.compile(r"(?:file:)?(?:/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\)")
ABSOLUTE = re.compile(r"(?:file:)?(?:/|~|[A-Za-z]:[\\/]|\\\\)")

RECORDS = ("command", "id", "base_model_name_or_path", "_name_or_path", "name_or_path", "parent_library")
VOCABULARIES = ("tokenizer.json", "vocab.json")


def shown_name(name: str) -> str:
    """The name of a model or file as others may see it: the last part of a path that leads somewhere on this machine.

    `org/name` and other relative names stay.
    """
    if LOCAL.match(name) is None:
        return name
    parts = [part for part in re.split(r"[\\/]", name) if part]
    return parts[-1] if parts else "…"


def shown_command(command: str) -> str:
    """A command line with the last parts of its local paths; it is still a command line."""
    return shlex.join(_with_value(word) for word in _words(command))


def recorded_paths(files: Iterable[Path]) -> dict[str, str]:
    """The JSON files that record an absolute path of this machine, by their names, with the first path of each.

    Looked at are commands, and names of models and files; tokens of a vocabulary may begin with a slash, too.
    """
    found: dict[str, str] = {}
    for file in files:
        if file.suffix == ".json" and file.name not in VOCABULARIES:
            try:
                value = json.loads(file.read_bytes())
            except (ValueError, RecursionError):  # a companion that nobody here reads
                continue
            path = next((path for name in _names(value) for path in absolute_paths(name)), None)
            if path is not None:
                found[file.name] = path
    return found


def absolute_paths(name: str) -> Iterator[str]:
    """The absolute paths in a name, or among the words of a command line."""
    for word in _words(name):
        value = word.partition("=")[2] if word.startswith("--") else word
        if ABSOLUTE.match(value) is not None:
            yield value


def is_on_hub(base: BaseRecord) -> bool:
    """Whether a base came from the Hub: then its commit is known, and else its name is that of a local folder."""
    return base.revision is not None


def _names(value: Any) -> Iterator[str]:
    """The texts under the keys that name models and commands, however deep."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield from (text for key in RECORDS if isinstance(text := item.get(key), str))
            left += item.values()
        elif isinstance(item, list):
            left += item


def _with_value(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + shown_name(value)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an open quote: whoever recorded it was no shell
        return command.split()
