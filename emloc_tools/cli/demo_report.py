"""How the demo's result is shown: one table, the memory of each training, and what was gained or lost in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from emloc_tools.cli import console

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.demo import DemoResult, Score

NUMBERS = (
    "loss",
    "perplexity",
    "accuracy",
    "gain closed",
    "parameters",
    "their size",
    "peak memory",
    "before loading",
    "time",
)
CLOSE = 0.005  # nats per token; smaller differences are not worth a word


def draw(out: Console, result: DemoResult) -> None:
    """Everything that the demo found, then where its files are."""
    console.heading(out, "Held-out text (loss in nats per token: less is better)")
    console.layer_table(out, [score_row(result, score) for score in in_order(result)], to_right=NUMBERS)
    out.print()
    console.heading(out, "Trainings")
    console.layer_table(out, training_rows(result), to_right=NUMBERS)
    out.print()
    for sentence in sentences(result):
        console.line(out, sentence)
    console.line(out, f"\nFiles, results.json and every command: {result.output}")


def score_row(result: DemoResult, score: Score) -> dict[str, str]:
    """A line of the table: model, LoRA, and what they score."""
    part = closed(result, score)
    return {
        "model": score.model if score.model == "base" else f"emulator {score.ratio:g}",
        "LoRA": described(score),
        "loss": f"{score.loss:.3f}",
        "perplexity": f"{score.perplexity:.1f}",
        "accuracy": f"{score.accuracy:.1%}",
        "gain closed": "" if part is None else f"{part:.0%}",
    }


def training_rows(result: DemoResult) -> list[dict[str, str]]:
    """Size, memory and time of each training."""
    return [
        {
            "trained on": "base" if training.ratio is None else f"emulator {training.ratio:g}",
            "parameters": f"{training.parameters:,}",
            "their size": console.size(training.parameter_bytes),
            "peak memory": console.size(training.peak_bytes),
            "before loading": console.size(training.idle_bytes),
            "time": f"{training.seconds:.0f} s",
        }
        for training in result.trainings
    ]


def in_order(result: DemoResult) -> list[Score]:
    """Base, upper bound, then each ratio from the emulator itself to the corrected LoRA, or the refined one."""
    place = {"none": 0, "trained on the base": 1, "uncorrected": 3, "corrected": 4, "refined": 5}

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
    refined = result.loss("base", ratio, "refined")
    if refined is not None:
        of_gain = "" if top is None or top >= bottom else f", {(bottom - refined) / (bottom - top):.0%} of that gain"
        yield f"  Some steps on the base itself, which streamed by, took it to {refined:.3f}{of_gain}."
