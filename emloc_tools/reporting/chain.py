"""What was made from what, step by step of the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from emloc_tools.reporting.collecting import Link, Report, Subject
from emloc_tools.reporting.sections import anchor_of
from emloc_tools.reporting.tables import kind_of
from emloc_tools.wording import fraction, size

STEPS = {
    "Base": ("base", "base with a head"),
    "Calibration": ("calibration",),
    "Emulator": ("emulator", "dense emulator"),
    "Trained LoRA": ("trained LoRA",),
    "Corrected LoRA": ("corrected LoRA",),
    "Refined LoRA": ("refined LoRA",),
    "Merged model": ("merged model",),
}


@dataclass(frozen=True)
class Origin:
    """A sentence on one thing that a folder was made from; `anchor` is its address if it is on the page."""

    kind: str
    name: str
    anchor: str | None
    proof: str


@dataclass(frozen=True)
class Node:
    """A folder in the chain: its name, what it holds in a line, and its origins. None has an address of its own."""

    name: str
    kind: str
    anchor: str | None
    summary: str
    origins: list[Origin]


def chain(report: Report) -> list[tuple[str, list[Node]]]:
    """The folders by steps of the method, without empty steps."""
    steps = []
    for step, kinds in STEPS.items():
        members = [each for each in report.subjects if kind_of(each) in kinds]
        if members:
            steps.append((step, [_node(each, report) for each in members]))
    return steps


def _node(subject: Subject, report: Report) -> Node:
    links = [link for link in report.links if link.made == subject.name]
    # What leads back through another thing on the page need not be said twice.
    origins = [_origin(link, report.subjects) for link in links]
    return Node(subject.name, kind_of(subject), _address(subject, report.subjects), _summary(subject), origins)


def _origin(link: Link, subjects: Sequence[Subject]) -> Origin:
    if link.source is None:
        return Origin(link.kind, link.said, None, "not among these files")
    proof = "same hash" if link.by == "hash" else "by its name"
    source = next(each for each in subjects if each.name == link.source)
    return Origin(link.kind, link.source, _address(source, subjects), proof)


def _address(subject: Subject, subjects: Sequence[Subject]) -> str | None:
    return None if subject.inspection.kind == "base" else anchor_of(subjects, subject.name)


def _summary(subject: Subject) -> str:
    found = subject.inspection
    facts, rows = found.facts, found.layers
    match kind_of(subject):
        case "calibration":
            tokens = sum(each["tokens"] for each in facts["data"])
            gradients = "with" if "loss" in facts else "without"
            return f"{tokens:,} tokens, {len(rows)} layers, {gradients} gradients"
        case "emulator":
            part = facts["parameters"] / facts["base_parameters"]
            error = median(row["relative_error"] for row in rows)
            return f"{part:.0%} of the parameters, median error {fraction(error)}"
        case "trained LoRA" | "corrected LoRA" | "refined LoRA":
            sizes = [row["correction"] for row in rows if "correction" in row]
            correction = f", median correction {fraction(median(sizes))}" if sizes else ""
            return f"{facts['lora_pairs']} pairs, {size(subject.stored_bytes)}{correction}"
    return size(subject.stored_bytes) if subject.stored_bytes else "no tensor files here"
