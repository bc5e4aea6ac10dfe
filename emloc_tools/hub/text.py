"""Names from files, written into YAML and Markdown so that they are shown and mean nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|~&$:@])")  # `:` and `@` make addresses into links


def one_line(text: str) -> str:
    """The printable characters of a text, in one line."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def prose(text: str) -> str:
    """A name among Markdown text."""
    return SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str, language: str = "") -> str:
    """Lines as a code block, whatever backticks are in them."""
    lines = [one_line(line) if language == "text" else line for line in text.splitlines()]
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; all but the first column to the right."""
    columns = list(columns)
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def yaml_header(values: Mapping[str, str | list[str] | None]) -> str:
    """The header of a model card. Strings are quoted as JSON does, which YAML reads alike; None is left out."""
    lines = ["---"]
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {item}" for item in value)]
        elif value is not None:
            lines.append(f"{key}: {json.dumps(one_line(value), ensure_ascii=False)}")
    return "\n".join([*lines, "---"])
