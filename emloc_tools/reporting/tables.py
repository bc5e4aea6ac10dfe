"""The tables of a report, the same for HTML and Markdown: layers, sizes, losses, memory, commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emloc_tools.files.plan import PlanV1
from emloc_tools.reporting.collecting import Subject
from emloc_tools.reporting.inspection import Inspection
from emloc_tools.reporting.losses import Losses
from emloc_tools.reporting.plots import memory_peaks
from emloc_tools.reporting.spectra import Spectrum
from emloc_tools.wording import MISSING, fraction, number, size


@dataclass(frozen=True)
class Cell:
    """What a cell shows, what it is sorted by (None: nothing was recorded), and a part of 1 that is drawn as a bar."""

    text: str
    value: float | str | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """A table with a caption. `numeric` says of each column whether it holds numbers, which are aligned to the right.

    A `long` one is folded up at first.
    """

    caption: str
    columns: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]
    long: bool = False


def word(text: object) -> Cell:
    """A cell of text; of None it says that nothing was recorded."""
    return Cell(MISSING) if text is None else Cell(str(text), str(text))


def count(value: float | None, text: str | None = None, bar: float | None = None) -> Cell:
    """A cell of a number, written as `text` if given."""
    return Cell(MISSING) if value is None else Cell(number(value) if text is None else text, value, bar)


def ratio(value: float | None, bar: float | None = None) -> Cell:
    """A cell of a number to three decimals."""
    return count(value, None if value is None else fraction(value), bar)


def table(caption: str, columns: Mapping[str, bool], rows: Sequence[list[Cell]], *, long: bool = False) -> Table:
    """A table of columns by their names, which say whether each is numeric."""
    return Table(caption, list(columns), list(columns.values()), list(rows), long)


def emulated_layers(subject: Subject) -> Table:
    """A row per factored layer: shape, rank, what is kept, errors, and the energy on both sides of the cut."""
    spectra = {spectrum.layer: spectrum for spectrum in subject.spectra}
    layers = subject.inspection.layers
    sensitive = any("sensitivity" in row for row in layers)
    experts = any("experts" in row for row in layers)
    columns = {
        "layer": False,
        **({"experts": True} if experts else {}),
        "out": True,
        "in": True,
        "rank": True,
        "parameters kept": True,
        "relative error": True,
        "energy beyond the cut": True,
        **({"sensitivity": True} if sensitive else {}),
    }
    rows = []
    for row in layers:
        kept = kept_part(row)
        beyond = _beyond(spectra.get(row["layer"]))
        rows.append(
            [
                word(row["layer"]),
                *([count(row.get("experts", 1))] if experts else []),
                count(row["out"]),
                count(row["in"]),
                count(row["rank"], bar=row["rank"] / min(row["out"], row["in"])),
                count(kept, f"{kept:.1%}", kept),
                ratio(row["relative_error"], row["relative_error"]),
                count(beyond, None if beyond is None else f"{beyond:.2%}"),
                *([count(row.get("sensitivity"))] if sensitive else []),
            ]
        )
    return table("Factored layers", columns, rows, long=True)


def kept_part(row: Mapping[str, int]) -> float:
    """The values that a layer's factors hold, as a part of those of its weight; for a stack they are equal."""
    return float(row["rank"] * (row["out"] + row["in"] + 1) / (row["out"] * row["in"]))


def _beyond(spectrum: Spectrum | None) -> float | None:
    return None if spectrum is None else spectrum.beyond


def corrected_layers(inspection: Inspection) -> Table:
    """A row per LoRA pair: its rank and scaling, and what the correction did to it."""
    columns = {"layer": False, "rank": True, "scaling": True, "‖D‖/‖sB'‖": True, "directions": True, "clamped": True}
    largest = max((row["correction"] for row in inspection.layers if "correction" in row), default=0.0) or 1.0
    rows = [
        [
            word(row["layer"]),
            count(row["rank"]),
            count(row["scaling"]),
            ratio(row.get("correction"), row["correction"] / largest if "correction" in row else None),
            count(row.get("directions")),
            count(row.get("clamped")),
        ]
        for row in inspection.layers
    ]
    return table("LoRA pairs", columns, rows, long=True)


def calibrated_layers(inspection: Inspection) -> Table:
    """A row per layer of a calibration: shape, the side whose second moments are kept, and tokens."""
    columns = {"layer": False, "out": True, "in": True, "statistics": False, "gradients": False, "tokens": True}
    rows = [
        [
            word(row["layer"]),
            count(row["out"]),
            count(row["in"]),
            word(row["statistics"]),
            word(row.get("gradients", "none")),
            count(row["tokens"]),
        ]
        for row in inspection.layers
    ]
    return table("Layers with statistics", columns, rows, long=True)


def sizes(subjects: Sequence[Subject]) -> Table:
    """Parameters and bytes of every folder, and as parts of those of the base."""
    emulators = [each.inspection.facts for each in subjects if each.inspection.kind == "emulator"]
    # Bytes are compared only with a base that is here, and only if there is no doubt which.
    bases = [each.stored_bytes for each in subjects if each.inspection.kind == "base" and each.stored_bytes]
    base_bytes = bases[0] if len(bases) == 1 else None
    wholes = {facts["base_parameters"] for facts in emulators}
    base_parameters = wholes.pop() if len(wholes) == 1 else None
    columns = {
        "folder": False,
        "kind": False,
        "parameters": True,
        "of the base's": True,
        "tensor files": True,
        "of the base's bytes": True,
    }
    rows = [_size(each, base_parameters, base_bytes) for each in subjects]
    if base_parameters is not None and not bases:
        of_base = [count(base_parameters), _part(base_parameters, base_parameters), count(None), count(None)]
        rows.insert(0, [word(emulators[0]["base"]), word("base, not here"), *of_base])
    return table("Parameters and bytes of tensors", columns, rows)


def _size(subject: Subject, base_parameters: int | None, base_bytes: int | None) -> list[Cell]:
    facts = subject.inspection.facts
    parameters = base_parameters if subject.inspection.kind == "base" else facts.get("parameters")
    stored = subject.stored_bytes or None
    return [
        word(subject.name),
        word(kind_of(subject)),
        count(parameters),
        _part(parameters, facts.get("base_parameters", base_parameters)),
        count(stored, size(stored or 0)),
        _part(stored, base_bytes),
    ]


def _part(value: int | None, whole: int | None) -> Cell:
    part = value / whole if value is not None and whole else None
    return count(part, None if part is None else f"{part:.1%}", part)


def kind_of(subject: Subject) -> str:
    """What a folder holds, in words."""
    found = subject.inspection
    if found.kind != "adapter":
        return found.kind
    if "refinement_steps" in found.facts:
        return "refined LoRA"
    return "corrected LoRA" if found.facts["corrected"] else "trained LoRA"


def measured(losses: Losses) -> Table:
    """A row per model and LoRA; the difference from the base is what the LoRA is worth."""
    base = next((row.loss for row in losses.rows if row.role == "base"), None)
    accurate = any(row.accuracy is not None for row in losses.rows)
    errors = any(row.standard_error is not None for row in losses.rows)
    columns = {
        "model and LoRA": False,
        f"loss, {losses.unit}": True,
        **({"standard error": True} if errors else {}),
        "against the base": True,
        **({"accuracy": True} if accurate else {}),
    }
    rows = []
    for row in losses.rows:
        difference = None if base is None else row.loss - base
        rows.append(
            [
                word(row.label + (" (chosen)" if row.chosen else "")),
                count(row.loss, f"{row.loss:.4f}"),
                *([count(row.standard_error, f"{row.standard_error or 0:.4f}")] if errors else []),
                count(difference, None if difference is None else f"{difference:+.4f}"),
                *([count(row.accuracy, f"{row.accuracy or 0:.1%}")] if accurate else []),
            ]
        )
    return table(f"Losses in {losses.name}", columns, rows)


def peaks(plan: PlanV1) -> Table:
    """The parts of each peak, and what is left of the memory that can be used."""
    columns = dict.fromkeys(
        ("what runs", "total", "weights", "LoRA and optimizer", "activations", "logits", "left"), True
    )
    columns["what runs"] = False
    usable, rows = plan.memory - plan.reserve, []
    for name, parts in memory_peaks(plan):
        values = (parts.total, parts.weights, parts.training_state, parts.activations, parts.logits)
        left = usable - parts.total
        text = size(left) if left >= 0 else f"{size(-left)} too much"
        rows.append([word(name), *(count(value, size(value)) for value in values), count(left, text)])
    return table("Peak memory", columns, rows)


def stages(plan: PlanV1) -> Table:
    """What the stages of emloc-tools need, about."""
    columns = {"stage": False, "memory": True, "disk": True, "disk for a while": True}
    rows = [
        [word(each.stage), *(count(value, size(value)) for value in (each.memory, each.disk, each.scratch))]
        for each in plan.stages
    ]
    return table("About what the stages need", columns, rows)


def commands(subjects: Sequence[Subject]) -> Table:
    """The command line and the libraries that each folder was made with."""
    columns = {"folder": False, "command line": False, "emloc-tools": False, "libraries": False}
    rows = []
    for each in subjects:
        made = each.inspection.made_by
        versions = None if made is None else ", ".join(f"{key} {value}" for key, value in made.libraries.items())
        command, ours = (None, None) if made is None else (made.command or None, made.emloc_tools)
        rows.append([word(each.name), word(command), word(ours), word(versions)])
    return table("How everything was made", columns, rows)
