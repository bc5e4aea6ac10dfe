"""A report as Markdown: the same sections and tables, without figures."""

from __future__ import annotations

import re
from collections.abc import Iterator

import emloc_tools
from emloc_tools.reporting.chain import chain
from emloc_tools.reporting.collecting import Report
from emloc_tools.reporting.sections import sections
from emloc_tools.reporting.tables import Cell, Table

SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|~])")


def markdown(report: Report, *, title: str) -> str:
    """The text. What comes from files is escaped, so that it is shown and means nothing."""
    return "\n".join(_lines(report, title)) + "\n"


def _lines(report: Report, title: str) -> Iterator[str]:
    yield f"# {_escape(title)}"
    steps = chain(report)
    if steps:
        yield "\n## What was made from what\n"
    for step, nodes in steps:
        yield f"- {step}"
        for node in nodes:
            yield f"  - **{_escape(node.name)}**: {_escape(node.summary)}"
            for origin in node.origins:
                yield f"    - {_escape(origin.kind)}: {_escape(origin.name)} ({origin.proof})"
    for section in sections(report):
        yield f"\n## {_escape(section.title)}\n"
        yield from (f"{_escape(sentence)}\n" for sentence in section.text)
        yield from (f"- {_escape(name)}: {_escape(value)}" for name, value in section.facts)
        for table in section.tables:
            yield from _table(table)
    yield f"\nMade by emloc-tools {emloc_tools.__version__}."


def _table(table: Table) -> Iterator[str]:
    if not table.rows:
        return
    yield f"\n{_escape(table.caption)}:\n"
    yield _row([_escape(column) for column in table.columns])
    yield _row(["--:" if numeric else "---" for numeric in table.numeric])
    yield from (_row([_cell(cell) for cell in row]) for row in table.rows)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return _escape(cell.text)


def _escape(text: str) -> str:
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))
