"""Means, standard deviations and the part of the gain that is closed, from the recorded scores, as tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import record
from benchmarks.transfer import cells, plot
from benchmarks.transfer.beds import BEDS

Scores = list[dict[str, Any]]
Key = tuple[str, str, float | None, str, str]  # base, bed, ratio, kind, variant


def write(scores: Scores, folder: Path) -> None:
    """Write `results/transfer.json` and `.md`."""
    table = summary(scores)
    figures = {
        **record.circumstances("transfer"),
        "scores": [{**dict(zip(KEYS, k, strict=True)), **v} for k, v in table.items()],
    }
    figures["command"] = f"python -m benchmarks.transfer --folder {folder.name}"
    record.write("transfer", figures, text(figures, table))
    for base in dict.fromkeys(key[0] for key in table):
        plot.draw(table, base, record.RESULTS / f"transfer-{base}.svg")


KEYS = ("base", "bed", "ratio", "kind", "variant")


def summary(scores: Scores) -> dict[Key, dict[str, Any]]:
    """Per combination: mean and standard deviation of the loss, and of the closed part of the gain, over the seeds.

    The gain of a seed is that of its own LoRA on the base over the untouched base.
    """
    ends: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)
    for score in scores:
        if score["kind"] == "base":
            ends[score["base"], score["bed"], score["seed"]][score["variant"]] = score["loss"]
    groups: dict[Key, Scores] = defaultdict(list)
    for score in scores:
        groups[tuple(score[name] for name in KEYS)].append(score)
    return {key: _of_group(key, group, ends) for key, group in groups.items()}


def _of_group(key: Key, group: Scores, ends: Mapping[tuple[str, str, int], Mapping[str, float]]) -> dict[str, Any]:
    losses = [score["loss"] for score in group]
    value: dict[str, Any] = {"seeds": len(group), "loss": mean(losses), "loss_std": spread(losses)}
    if all("exact" in score for score in group):
        value["exact"] = mean(score["exact"] for score in group)
    if "chosen" in group[0]:
        value["chosen"] = [score["chosen"] for score in group]
    closed = []
    for score in group:
        end = ends.get((score["base"], score["bed"], score["seed"]), {})
        bottom, top = end.get("zero-shot"), end.get("LoRA on the base")
        if bottom is not None and top is not None and not key[4].startswith("emulator"):
            closed.append((bottom - score["loss"]) / (bottom - top))
    if closed:
        value |= {"closed": mean(closed), "closed_std": spread(closed)}
    return value


def spread(values: Iterable[float]) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    values = list(values)
    return stdev(values) if len(values) > 1 else 0.0


def text(figures: Mapping[str, Any], table: Mapping[Key, Mapping[str, Any]]) -> str:
    """A table per base and bed, in Markdown: a row per stand-in and ratio; then the ablations and the uses."""
    lines = ["# Transfer", ""]
    for base, bed in dict.fromkeys((key[0], key[1]) for key in table):
        own = {key[2:]: value for key, value in table.items() if key[:2] == (base, bed)}
        lines += [f"### Base {base}, bed {bed}", "", *_stand_ins(own), ""]
    lines += _across_beds("Ablations of the gradient weighting", "stand-in", _ablations(table))
    lines += _across_beds("Other uses of the same LoRA", "LoRA of, use", _uses(table))
    lines += _across_beds("Refined on the base", "LoRA of, steps", _refined(table))
    return "\n".join([*lines, record.sentence(figures)]) + "\n"


def _stand_ins(own: Mapping[tuple[float | None, str, str], Mapping[str, Any]]) -> list[str]:
    """The table of one base and bed."""
    answers = any("exact" in value for value in own.values())
    titles = ["ratio", "stand-in", "it, with LoRA", "base, uncorrected", "base, corrected", "gain closed"]
    titles += ["exact"] if answers else []
    lines = [f"| {' | '.join(titles)} |", "|--:|---|" + "--:|" * (len(titles) - 2)]
    for variant in ("zero-shot", "LoRA on the base"):
        value = own.get((None, "base", variant), {})
        lines.append(_row(["", variant, "", loss(value), "", part(value)], value, answers))
    shown = (*cells.EMULATORS, *cells.STAND_INS)
    for ratio, kind in sorted({key[:2] for key in own if key[0] is not None and key[1] in shown}):
        its, raw, corrected = (
            own.get((ratio, kind, v), {}) for v in ("emulator with LoRA", "uncorrected", "corrected")
        )
        its = its or own.get((ratio, kind, "with LoRA"), {})
        best = corrected or raw or its
        entries = [f"{ratio:g}", kind, loss(its), loss(raw), loss(corrected), part(best)]
        lines.append(_row(entries, best, answers))
    return lines


Columns = dict[tuple[str, float, str], dict[str, Mapping[str, Any]]]  # base, ratio, name -> bed -> value


def _ablations(table: Mapping[Key, Mapping[str, Any]]) -> Columns:
    """Corrected LoRAs of the emulators of which one setting was changed, with the unchanged one."""
    columns: Columns = defaultdict(dict)
    for (base, bed, ratio, kind, variant), value in table.items():
        if kind in cells.ABLATIONS and variant == "corrected" and ratio is not None:
            columns[base, ratio, "gradient"][bed] = table[base, bed, ratio, "gradient", variant]
            columns[base, ratio, kind][bed] = value
    return columns


def _uses(table: Mapping[Key, Mapping[str, Any]]) -> Columns:
    """What else was made of a LoRA, with the correction as it is."""
    columns: Columns = defaultdict(dict)
    for (base, bed, ratio, kind, variant), value in table.items():
        if kind in cells.USES and ratio is not None:
            of = cells.USES[kind]
            columns[base, ratio, f"{of}, corrected"][bed] = table[base, bed, ratio, of, "corrected"]
            columns[base, ratio, f"{of}, {variant}"][bed] = value
    return columns


def _refined(table: Mapping[Key, Mapping[str, Any]]) -> Columns:
    """LoRAs that were trained some more on the base, with the correction as it is; and those of the base alone."""
    columns: Columns = defaultdict(dict)
    for (base, bed, ratio, kind, variant), value in table.items():
        if kind == cells.ALONE:
            columns[base, 1.0, f"the base, {variant}"][bed] = value
        if kind in {**cells.REFINED, **cells.STEP_SIZES} and ratio is not None:
            of = {**cells.REFINED, **cells.STEP_SIZES}[kind]
            columns[base, ratio, f"{of}, corrected"][bed] = table[base, bed, ratio, of, "corrected"]
            columns[base, ratio, f"{of}, {variant}"][bed] = value
    return columns


def _across_beds(title: str, what: str, columns: Columns) -> list[str]:
    """A table of the gain closed with a column per bed; nothing where nothing was run."""
    if not columns:
        return []
    beds = [bed for bed in BEDS if any(bed in values for values in columns.values())]
    lines = [f"### {title}: gain closed", "", f"| base | ratio | {what} | {' | '.join(beds)} |"]
    lines.append("|---|--:|---|" + "--:|" * len(beds))
    for (base, ratio, name), values in sorted(columns.items(), key=lambda item: item[0][:2]):
        closed = [part(values.get(bed, {})) for bed in beds]
        lines.append(f"| {base} | {ratio:g} | {name} | {' | '.join(closed)} |")
    return [*lines, ""]


def _row(cells: list[str], value: Mapping[str, Any], answers: bool) -> str:
    exact = [f"{value['exact']:.0%}" if "exact" in value else ""] if answers else []
    return f"| {' | '.join([*cells, *exact])} |"


def loss(value: Mapping[str, Any]) -> str:
    """Mean and standard deviation of a loss."""
    return f"{value['loss']:.3f} ± {value['loss_std']:.3f}" if value else ""


def part(value: Mapping[str, Any]) -> str:
    """Mean and standard deviation of the closed part of the gain."""
    return f"{value['closed']:.0%} ± {value['closed_std']:.0%}" if "closed" in value else ""


def read(path: Path) -> Scores:
    """The recorded scores of a run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
