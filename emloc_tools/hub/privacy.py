"""What of recorded names may be shown to others: names of models as they are, of local paths only the last part."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from emloc_tools.files.manifest import BaseRecord

LOCAL = re.compile(r"(?:file:)?(?:/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\)")
ABSOLUTE = re.compile(r"(?:file:)?(?:/|~|[A-Za-z]:[\\/]|\\\\)")


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


def absolute_paths(*names: str | None) -> Iterator[str]:
    """The absolute paths among names, and among the words of command lines."""
    for name in names:
        for word in _words(name or ""):
            value = word.partition("=")[2] if word.startswith("--") else word
            if ABSOLUTE.match(value) is not None:
                yield value


def is_on_hub(base: BaseRecord) -> bool:
    """Whether a base came from the Hub: then its commit is known, and else its name is that of a local folder."""
    return base.revision is not None


def _with_value(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + shown_name(value)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an open quote: whoever recorded it was no shell
        return command.split()
