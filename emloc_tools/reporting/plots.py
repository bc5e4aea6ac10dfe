"""The figures of a report. All can be read without colour: cells hold numbers, bars are hatched, points have shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emloc_tools.files.plan import Parts, PlanV1
from emloc_tools.reporting.kinds import Grid, depth_text
from emloc_tools.reporting.losses import Losses
from emloc_tools.reporting.spectra import Spectrum
from emloc_tools.reporting.svg import INK, LINE, MUTED, PAPER, SERIES, SETTINGS, new_figure
from emloc_tools.wording import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = (58, 22)  # pixels
LETTER = 6.2  # pixels of a letter of an axis's labels
CURVES = 5  # depths whose spectra are drawn
PANELS = 12  # kinds whose spectra are drawn
MARKS = {"base": "o", "upper bound": "^", "emulator": "s", "uncorrected": "D", "corrected": "D"}
PARTS = (("weights", ""), ("training_state", "///"), ("activations", ".."), ("logits", "xxx"))
AROUND = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}  # of text on lines or hatching
PART_NAMES = {"training_state": "LoRA and optimizer"}


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many pixels, to draw on in the report's style."""
    figure = new_figure(width, height)
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):
        yield figure


def heat_map(
    grid: Grid, shades: Mapping[str, float], texts: Mapping[str, str], *, limits: tuple[float, float]
) -> Figure:
    """Depth × kind: a cell for every layer with its text, the lighter the larger its shade between the limits.

    Where there is no such layer, or nothing was recorded, the cell is hatched.
    """
    letters = max(map(len, grid.kinds))
    margin = LETTER * max(len(depth_text(depth)) for depth in grid.depths) + 40
    width = margin + CELL[0] * len(grid.kinds) + 0.5 * LETTER * letters
    height = CELL[1] * len(grid.depths) + 0.62 * LETTER * letters + 30
    with drawing(width, height) as figure:
        axes = figure.subplots()
        span = max(limits[1] - limits[0], 1e-12)
        for row, depth in enumerate(grid.depths):
            for column, kind in enumerate(grid.kinds):
                name = grid.names.get((depth, kind), "")
                _cell(
                    axes,
                    column,
                    row,
                    texts.get(name, ""),
                    (shades[name] - limits[0]) / span if name in shades else None,
                )
        axes.set_xlim(-0.5, len(grid.kinds) - 0.5)
        axes.set_ylim(len(grid.depths) - 0.5, -0.5)
        axes.set_xticks(range(len(grid.kinds)), grid.kinds, rotation=35, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(grid.depths)), [depth_text(depth) for depth in grid.depths])
        axes.set_ylabel("block" if grid.blocks else "")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _cell(axes: Axes, column: int, row: int, text: str, shade: float | None) -> None:
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    corner = (column - 0.5, row - 0.5)
    if shade is None:
        cell = Rectangle(corner, 1, 1, facecolor="none", edgecolor=LINE, hatch="////", linewidth=0.5, clip_on=False)
        axes.add_patch(cell).set_in_layout(False)  # measuring every cell would take most of the time
        return
    color = mpl.colormaps["cividis"](min(max(shade, 0.0), 1.0))
    cell = Rectangle(corner, 1, 1, facecolor=color, edgecolor=PAPER, linewidth=1, clip_on=False)
    axes.add_patch(cell).set_in_layout(False)
    shown = axes.text(column, row, text, ha="center", va="center", color=_on(color), fontsize=11)
    shown.set_in_layout(False)


def _on(color: Sequence[float]) -> str:
    """Black or white, whichever contrasts more with a colour: at least 4.58 to 1, by the WCAG's luminance."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def spectra_plot(grid: Grid, spectra: Mapping[str, Spectrum]) -> Figure:
    """A panel per kind: the energy of each stored direction at a few depths, up to the cut; hatched beyond it."""
    kinds = [kind for kind in grid.kinds if any(name in spectra for name in _of_kind(grid, kind).values())][:PANELS]
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    with drawing(60 + 265 * columns, 60 + 205 * rows) as figure:
        panels: Any = figure.subplots(rows, columns, squeeze=False, sharey=True)
        shown = _spread([depth for depth in grid.depths if any((depth, kind) in grid.names for kind in kinds)], CURVES)
        for panel, kind in zip(panels.flat, kinds, strict=False):
            names = _of_kind(grid, kind)
            _panel(
                panel, kind, [(place, depth, spectra.get(names.get(depth, ""))) for place, depth in enumerate(shown)]
            )
        for panel in list(panels.flat)[len(kinds) :]:
            panel.set_visible(False)
        handles = {
            label: handle
            for panel in panels.flat
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=CURVES + 1)
        figure.supylabel("share of the layer's output energy", fontsize=12)
        for panel in panels[-1]:
            panel.set_xlabel("direction, strongest first")
    return figure


def _of_kind(grid: Grid, kind: str) -> dict[tuple[int, ...], str]:
    return {depth: name for (depth, other), name in grid.names.items() if other == kind}


def _panel(axes: Axes, kind: str, curves: Sequence[tuple[int, tuple[int, ...], Spectrum | None]]) -> None:
    styles = ("-", "--", "-.", ":", (0, (1, 3)))
    known = [(place, depth, spectrum) for place, depth, spectrum in curves if spectrum is not None and spectrum.share]
    axes.set_title(kind)
    axes.set_yscale("log")
    if not known:
        return
    full = max(spectrum.full_rank for _, _, spectrum in known)
    for place, depth, spectrum in known:
        color, style = SERIES[place], styles[place]
        axes.plot(spectrum.direction, spectrum.share, color=color, linestyle=style, label=f"block {depth_text(depth)}")
        axes.plot(spectrum.direction[-1:], spectrum.share[-1:], color=color, marker="|", markersize=9, linestyle="")
    cut = max(spectrum.rank for _, _, spectrum in known)
    if cut < full:
        axes.axvspan(
            cut, full * 1.05, facecolor="none", edgecolor=LINE, hatch="////", linewidth=0, label="beyond the cut"
        )
        lost = [100 * spectrum.beyond for _, _, spectrum in known]
        low, high = (f"{value:.2g}" for value in (min(lost), max(lost)))
        text = f"not stored,\n{low if low == high else f'{low} to {high}'} %\nof the energy"
        axes.text(0.97, 0.95, text, transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=11, bbox=AROUND)
    axes.set_xscale("log")
    axes.set_xlim(0.9, full * 1.05)
    # matplotlib's own labels of logarithmic axes are mathematics, which is switched off for the sake of names.
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.minorticks_off()
    axes.grid(axis="y", linewidth=0.5)


def _spread(items: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """`count` of the items, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(at * (len(items) - 1) / (count - 1))] for at in range(count)]


def losses_plot(losses: Losses) -> Figure:
    """A point for every loss, with its standard error where known; a line at the base's own."""
    rows = losses.rows
    with drawing(420 + LETTER * max(len(row.label) for row in rows), 60 + 26 * len(rows)) as figure:
        axes = figure.subplots()
        for at, row in enumerate(rows):
            filled = row.role in ("corrected", "upper bound", "base")
            color = SERIES[list(MARKS).index(row.role)]
            axes.errorbar(
                [row.loss],
                [at],
                xerr=None if row.standard_error is None else [row.standard_error],
                marker=MARKS[row.role],
                markersize=7,
                color=color,
                markerfacecolor=color if filled else PAPER,
                ecolor=MUTED,
                capsize=3,
                linestyle="",
            )
            text = f"{row.loss:.4f}" + (" chosen" if row.chosen else "")
            axes.annotate(text, (row.loss, at), xytext=(8, 4), textcoords="offset points", color=INK, fontsize=11)
        for row in rows:
            if row.role == "base":
                axes.axvline(row.loss, color=MUTED, linestyle=":", linewidth=1, zorder=0)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.7)
        axes.margins(x=0.18)
        axes.set_xlabel(f"loss, {losses.unit} (less is better)")
        axes.grid(axis="y", linewidth=0.5)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
    return figure


def memory_plot(plan: PlanV1) -> Figure:
    """The peaks of training and inference in their parts, against the memory and what of it can be used."""
    peaks = memory_peaks(plan)
    usable = plan.memory - plan.reserve
    unit = max(2**20, 2 ** (10 * ((plan.memory.bit_length() - 1) // 10)))
    name = size(unit).partition(" ")[2]
    with drawing(820, 120 + 42 * len(peaks)) as figure:
        axes = figure.subplots()
        for at, (_, parts) in enumerate(peaks):
            left = 0.0
            for (part, hatch), color in zip(PARTS, SERIES, strict=False):
                value = getattr(parts, part) / unit
                label = PART_NAMES.get(part, part) if at == 0 else None
                axes.barh(at, value, left=left, height=0.6, color=PAPER, edgecolor=color, hatch=hatch, label=label)
                left += value
            axes.annotate(
                size(parts.total),
                (left, at),
                xytext=(5, -4),
                textcoords="offset points",
                color=INK,
                bbox=AROUND,
                fontsize=11,
            )
        axes.axvline(plan.memory / unit, color=INK, linewidth=1.5, label=f"memory, {size(plan.memory)}")
        axes.axvline(usable / unit, color=INK, linewidth=1.2, linestyle="--", label=f"to be used of it, {size(usable)}")
        axes.set_yticks(range(len(peaks)), [label for label, _ in peaks])
        axes.set_ylim(len(peaks) - 0.5, -0.5)
        axes.set_xlim(0, 1.14 * max(plan.memory, *(parts.total for _, parts in peaks)) / unit)
        axes.set_xlabel(f"peak memory, {name}")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        figure.legend(loc="outside lower left", ncols=3)
    return figure


def memory_peaks(plan: PlanV1) -> list[tuple[str, Parts]]:
    """What a plan foresees, by what runs."""
    emulator = [("emulator, training", plan.emulator.training)] if plan.emulator is not None else []
    return [*emulator, ("base, training", plan.base_model.training), ("base, inference", plan.inference)]
