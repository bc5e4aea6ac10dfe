"""How the demo's result is shown: one table, the memory of each training, and what was gained or lost in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from emloc_tools.cli import console

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.demo import DemoResult, Score

CLOSE = 0.005  # nats per token; smaller differences are not worth a word


def draw(out: Console, result: DemoResult) -> None:
    """Everything that the demo found, then where its files are."""
    out.print(f"[bold]Held-out text, {len(result.trainings)} LoRAs[/bold] (loss in nats per token; less is better)")
    out.print(scores_table(result))
    out.print("\n[bold]Training[/bold]")
    out.print(trainings_table(result))
    out.print()
    for sentence in sentences(result):
        out.print(sentence, soft_wrap=True)
    out.print(f"\nFiles, results.json and every command: {result.output}", soft_wrap=True)


def scores_table(result: DemoResult) -> Table:
    """One row per combination of model and adapter, from the untouched base to the corrected LoRAs."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("model", "LoRA", "loss", "perplexity", "accuracy", "gain closed"):
        table.add_column(title, justify="left" if title in ("model", "LoRA") else "right", no_wrap=True)
    for score in in_order(result):
        part = closed(result, score)
        table.add_row(
            score.model if score.model == "base" else f"emulator {score.ratio:g}",
            described(score),
            f"{score.loss:.3f}",
            f"{score.perplexity:.2f}",
            f"{score.accuracy:.1%}",
            "" if part is None else f"{part:.0%}",
        )
    return table


def trainings_table(result: DemoResult) -> Table:
    """Size, time and memory of each training."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("trained on", "parameters", "their size", "peak memory", "of it before loading", "time"):
        table.add_column(title, justify="left" if title == "trained on" else "right", no_wrap=True)
    for training in result.trainings:
        table.add_row(
            "base" if training.ratio is None else f"emulator {training.ratio:g}",
            f"{training.parameters:,}",
            console.size(training.parameter_bytes),
            console.size(training.peak_bytes),
            console.size(training.idle_bytes),
            f"{training.seconds:.0f} s",
        )
    return table


def in_order(result: DemoResult) -> list[Score]:
    """Base, upper bound, then each ratio from the emulator itself to the corrected LoRA."""
    place = {"none": 0, "trained on the base": 1, "uncorrected": 3, "corrected": 4}

    def key(score: Score) -> tuple[float, int]:
        step = place[score.adapter] - (0 if score.model == "base" else 1)
        return (-2.0 if score.ratio is None else -score.ratio, step)

    return sorted(result.scores, key=key)


def described(score: Score) -> str:
    """The adapter in words."""
    if score.adapter == "none":
        return "none"
    if score.adapter == "trained on the base":
        return "trained on the base itself"
    if score.model == "emulator":
        return "trained on it"
    return f"from emulator {score.ratio:g}, {score.adapter}"


def closed(result: DemoResult, score: Score) -> float | None:
    """The part of the upper bound's gain over the untouched base that a LoRA on the base has."""
    bottom, top = result.loss("base", None, "none"), result.loss("base", None, "trained on the base")
    if bottom is None or top is None or top >= bottom or score.model != "base":
        return None
    return (bottom - score.loss) / (bottom - top)


def sentences(result: DemoResult) -> Iterator[str]:
    """What was gained or lost, ratio by ratio."""
    bottom, top = result.loss("base", None, "none"), result.loss("base", None, "trained on the base")
    if bottom is None:
        return
    if top is not None and top >= bottom:
        yield (
            f"A LoRA trained on the base itself does not help on this text ({top:.3f} against {bottom:.3f}): "
            "train for longer, or with another --learning-rate."
        )
    for training in result.trainings:
        if training.ratio is not None:
            yield from _of_ratio(result, training.ratio, bottom, top)


def _of_ratio(result: DemoResult, ratio: float, bottom: float, top: float | None) -> Iterator[str]:
    raw, corrected = result.loss("base", ratio, "uncorrected"), result.loss("base", ratio, "corrected")
    if raw is None or corrected is None:
        return
    name = f"The LoRA from emulator {ratio:g}"
    if corrected >= bottom:
        yield (
            f"{name} makes the base worse ({bottom:.3f} → {corrected:.3f}): use the base without it, "
            "or take a larger --ratio."
        )
    elif top is not None and top < bottom:
        part = (bottom - corrected) / (bottom - top)
        yield (
            f"{name} brings the base from {bottom:.3f} to {corrected:.3f}: {part:.0%} of what a LoRA trained on the "
            "base itself gains."
        )
    else:
        yield f"{name} brings the base from {bottom:.3f} to {corrected:.3f}."
    change = raw - corrected
    if abs(change) < CLOSE:
        yield f"  The correction changed little here ({raw:.3f} before, {corrected:.3f} after)."
    elif change > 0:
        yield f"  Of that, the correction brought {change:.3f} ({raw:.3f} before it)."
    else:
        yield f"  Without the correction it would have been {-change:.3f} better ({raw:.3f})."
