"""A report as one HTML file that needs nothing else, neither from the network nor from beside it."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

import emloc_tools
from emloc_tools.records import Progress, Step, silent
from emloc_tools.reporting.chain import chain
from emloc_tools.reporting.collecting import Report
from emloc_tools.reporting.sections import Section, sections
from emloc_tools.reporting.svg import to_svg
from emloc_tools.reporting.tables import Table


@dataclass(frozen=True)
class _Drawn:
    svg: str
    caption: str


@dataclass(frozen=True)
class _Part:
    """A section whose figures are drawn."""

    anchor: str
    title: str
    text: list[str]
    facts: list[tuple[str, str]]
    drawings: list[_Drawn]
    tables: list[Table]


def page(report: Report, *, title: str, progress: Progress = silent) -> str:
    """The page. All text from files is escaped, and a policy in its head lets no other style or script run."""
    css, js = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(js)}'; base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    parts = list(sections(report))
    return environment.from_string(_asset("page.html.j2")).render(
        policy=policy,
        css=css,
        js=js,
        version=emloc_tools.__version__,
        title=title,
        subtitle=subtitle(report),
        chain=chain(report),
        sections=_drawn(parts, progress),
    )


def subtitle(report: Report) -> str:
    """How much is reported on."""
    counted = [(len(report.subjects), "folder"), (len(report.losses), "set of losses"), (len(report.plans), "plan")]
    plural = {"folder": "folders", "set of losses": "sets of losses", "plan": "plans"}
    return ", ".join(f"{count} {word if count == 1 else plural[word]}" for count, word in counted if count)


def _drawn(parts: Sequence[Section], progress: Progress) -> list[_Part]:
    total, done, drawn = sum(len(part.drawings) for part in parts), 0, []
    for part in parts:
        figures = []
        for drawing in part.drawings:
            done += 1
            svg = to_svg(drawing.draw(), f"figure{done}", drawing.caption)
            figures.append(_Drawn(svg, drawing.caption))
            progress(Step("draw", done, total, part.title))
        drawn.append(_Part(part.anchor, part.title, part.text, part.facts, figures, part.tables))
    return drawn


def _asset(name: str) -> str:
    return (importlib.resources.files("emloc_tools.reporting") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"
