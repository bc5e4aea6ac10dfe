"""A report as a sequence of sections: sentences, facts, figures and tables, in the order in which it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from emloc_tools.files.plan import PlanV1
from emloc_tools.reporting import plots, tables
from emloc_tools.reporting.collecting import Report, Subject
from emloc_tools.reporting.kinds import Grid, grids
from emloc_tools.reporting.losses import Losses
from emloc_tools.reporting.tables import Table, kind_of
from emloc_tools.wording import MISSING, fraction, number, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = (
    "Mean loss on held-out samples, with the standard error where it was recorded. ○ base, △ LoRA trained on the base "
    "itself, □ emulator, ◇ base with another LoRA, filled if corrected. The dotted line is the base without a LoRA."
)


@dataclass(frozen=True)
class Drawing:
    """A figure, made when it is needed, with a caption that says how to read it."""

    draw: Callable[[], Figure]
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page. `anchor` is its address in the page."""

    anchor: str
    title: str
    text: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def anchor_of(subjects: Sequence[Subject], name: str) -> str:
    """The address of a folder's section."""
    return f"folder-{[each.name for each in subjects].index(name) + 1}"


def sections(report: Report) -> Iterator[Section]:
    """All sections but the chain of provenance, which begins the page."""
    if report.subjects:
        sizes = tables.sizes(report.subjects)
        yield Section("sizes", "Parameters and bytes", tables=[sizes])
    for place, losses in enumerate(report.losses, 1):
        drawing = Drawing(partial(plots.losses_plot, losses), LOSSES)
        title = f"Losses: {losses.name}"
        text = verdict(losses)
        yield Section(f"losses-{place}", title, text, drawings=[drawing], tables=[tables.measured(losses)])
    for place, (name, plan) in enumerate(report.plans.items(), 1):
        yield _plan(f"plan-{place}", name, plan)
    for each in report.subjects:
        if each.inspection.kind != "base":
            yield _folder(anchor_of(report.subjects, each.name), each)
    if report.subjects:
        yield Section("commands", "How everything was made", tables=[tables.commands(report.subjects)])


def verdict(losses: Losses) -> list[str]:
    """What the best LoRA from an emulator is worth to the base, in a sentence; nothing where that was not measured."""
    base = next((row.loss for row in losses.rows if row.role == "base"), None)
    bound = next((row.loss for row in losses.rows if row.role == "upper bound"), None)
    transferred = [row for row in losses.rows if row.role in ("uncorrected", "corrected")]
    if base is None or not transferred:
        return []
    best = min(transferred, key=lambda row: row.loss)
    if best.loss >= base:
        return [f"The base is better without any of these LoRAs: {base:.4f}, and {best.loss:.4f} with {best.label}."]
    part = ""
    if bound is not None and bound < base:
        part = f", {(base - best.loss) / (base - bound):.0%} of what a LoRA trained on the base itself gains"
    return [f"The best of the LoRAs ({best.label}) brings the base from {base:.4f} to {best.loss:.4f}{part}."]


def _plan(anchor: str, name: str, plan: PlanV1) -> Section:
    given = plan.conditions
    facts = [
        ("base", f"{plan.base.id} ({plan.base.architecture})"),
        ("memory", f"{size(plan.memory)}, of which {size(plan.reserve)} are left for what is not foreseen"),
        (
            "emulator",
            "none is needed" if plan.ratio is None else f"ratio {plan.ratio:g}, {plan.factored_layers} layers",
        ),
        (
            "step",
            f"{given.batch_size} x {given.sequence_length:,} tokens, {given.dtype}, LoRA of rank {given.lora_rank}",
        ),
        ("optimizer", f"{given.optimizer}, {'with' if given.gradient_checkpointing else 'without'} checkpointing"),
    ]
    drawing = Drawing(partial(plots.memory_plot, plan), "Peak memory in parts (by hatching), and the memory there is.")
    return Section(anchor, f"Memory plan: {name}", [], facts, [drawing], [tables.peaks(plan), tables.stages(plan)])


def _folder(anchor: str, subject: Subject) -> Section:
    found, title = subject.inspection, f"{kind_of(subject).capitalize().replace('lora', 'LoRA')}: {subject.name}"
    facts = [(key.replace("_", " "), _text(key, value)) for key, value in found.facts.items() if key != "made_by"]
    if found.hash is not None:
        facts.append(("hash", found.hash))
    match found.kind:
        case "emulator":
            text, drawings = _emulator(subject)
            return Section(anchor, title, text, facts, drawings, [tables.emulated_layers(subject)])
        case "adapter":
            text, drawings = _corrected(subject) if found.facts["corrected"] else ([], [])
            return Section(anchor, title, text, facts, drawings, [tables.corrected_layers(found)])
        case "calibration":
            return Section(anchor, title, [], facts, [], [tables.calibrated_layers(found)])
    return Section(anchor, title, [], facts)


def _text(key: str, value: Any) -> str:
    """A fact as people read it."""
    if value is None:
        return MISSING
    if key == "data":
        parts = (f"{each['file']}: {each['samples']:,} samples, {each['tokens']:,} tokens" for each in value)
        return "; ".join(parts) or "none: plain SVD of the weights"
    if key == "dense_by_reason":
        return "; ".join(f"{count:,}: {reason}" for reason, count in value.items()) or "none"
    if key.endswith("_bytes"):
        return size(value)
    return number(value)


def _emulator(subject: Subject) -> tuple[list[str], list[Drawing]]:
    rows = {row["layer"]: row for row in subject.inspection.layers}
    errors = {name: row["relative_error"] for name, row in rows.items()}
    weighted = "as the loss minds them" if "weighting" in subject.inspection.facts else "as they are"
    measured = (
        f"of the outputs on the calibration data, {weighted}" if subject.inspection.made_from else "of the weight"
    )
    worst = max(errors, key=lambda name: errors[name])
    text = [
        f"{len(rows)} factored layers. Relative error {measured}: median {fraction(median(errors.values()))}, largest "
        f"{fraction(errors[worst])} in {worst}."
    ]
    shares = {name: row["rank"] / min(row["out"], row["in"]) for name, row in rows.items()}
    ranks = {name: number(row["rank"]) for name, row in rows.items()}
    spectra = {spectrum.layer: spectrum for spectrum in subject.spectra}
    drawings = []
    for grid in grids(rows):
        of = f" in {grid.blocks}" if grid.blocks else " outside of blocks"
        ranks_caption = (
            f"Rank of each layer{of}: blocks down, kinds across. The lighter, the larger a part of full rank."
        )
        drawings += [
            _heat_map(grid, shares, ranks, ranks_caption),
            _heat_map(grid, errors, _fractions(errors), f"Relative error of each layer{of}, 0 to 1."),
        ]
        if any(name in spectra for name in grid.names.values()):
            caption = (
                f"Spectra{of}: the share of a layer's output energy that each stored direction carries, to the cut "
                "at its rank (marked |). What lies beyond is not stored: only its energy in all is known."
            )
            drawings.append(Drawing(partial(plots.spectra_plot, grid, spectra), caption))
    return text, drawings


def _corrected(subject: Subject) -> tuple[list[str], list[Drawing]]:
    rows = {row["layer"]: row for row in subject.inspection.layers if "correction" in row}
    if not rows:
        return ["Stored as it was trained: no pair was corrected."], []
    sizes = {name: row["correction"] for name, row in rows.items()}
    clamped, directions = (sum(row[key] for row in rows.values()) for key in ("clamped", "directions"))
    text = [
        f"{len(rows)} LoRA pairs corrected by D, {directions:,} directions, of which {clamped:,} were clamped. "
        f"Size of the correction ‖D‖ relative to what was trained ‖sB'‖: median {fraction(median(sizes.values()))}, "
        f"largest {fraction(max(sizes.values()))}."
    ]
    drawings = []
    for grid in grids(rows):
        of = f" in {grid.blocks}" if grid.blocks else " outside of blocks"
        drawings.append(
            _heat_map(grid, sizes, _fractions(sizes), f"‖D‖/‖sB'‖ of each pair{of}: blocks down, kinds across.")
        )
    return text, drawings


def _heat_map(grid: Grid, shades: dict[str, float], texts: dict[str, str], caption: str) -> Drawing:
    limits = (0.0, max(shades.values(), default=1.0) or 1.0)
    return Drawing(partial(plots.heat_map, grid, shades, texts, limits=limits), caption)


def _fractions(values: dict[str, float]) -> dict[str, str]:
    return {name: fraction(value) for name, value in values.items()}
