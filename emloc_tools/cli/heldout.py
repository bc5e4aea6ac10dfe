"""How `correct` shows losses on held-out samples, and what it says of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.files.manifest import Candidate
    from emloc_tools.stages.selection import HeldOut, Tried

ADVICE = (
    "refine the LoRA on the base, or build the emulator with a higher --ratio, calibrate on data of the task itself, "
    "and with --gradients"
)

NAMES = {"none": "none", "trained": "uncorrected", "corrected": "corrected"}


def draw(out: Console, heldout: HeldOut) -> None:
    """The losses of all candidates, and the differences from no LoRA and from the corrected one, ± standard errors."""
    from emloc_tools.cli import console

    none, reference = _find(heldout, "none", 0.0), _find(heldout, "corrected", 1.0)
    selected = heldout.chosen is not None
    rows = []
    for place, each in enumerate(heldout.candidates):
        row = {
            "LoRA": NAMES[each.adapter],
            "scale": "" if each is none else f"{each.scale:g}",
            "loss": f"{each.loss:.4f} ± {each.standard_error:.4f}",
            "against none": "" if each is none else _difference(each, none, each.standard_error_to_none),
            "against corrected": (
                "" if each is reference else _difference(each, reference, each.standard_error_to_corrected)
            ),
        }
        rows.append({**row, "": "chosen" if place == heldout.chosen else ""} if selected else row)
    labels = heldout.predicts == "labels"
    counted = "label on" if labels else f"token on {heldout.data.tokens:,} tokens of"
    console.heading(out, f"Loss per {counted} {_samples(heldout)}, ± standard error")
    console.layer_table(out, rows, to_right=["scale", "loss", "against none", "against corrected"])


def warnings(heldout: HeldOut) -> list[str]:
    """What must not be overlooked: a LoRA that loses against none, and samples too few to tell."""
    none, reference = _find(heldout, "none", 0.0), _find(heldout, "corrected", 1.0)
    stored = reference if heldout.chosen is None else heldout.candidates[heldout.chosen]
    found = []
    if stored is not none:
        gain, error = none.loss - stored.loss, stored.standard_error_to_none
        numbers = f"{none.loss:.4f} against {stored.loss:.4f}, difference {abs(gain):.4f} ± {error:.4f}"
        if gain <= 0:
            message = f"the base is better without the {named(stored)} on these data ({numbers}): {ADVICE}"
            if heldout.chosen is None:
                message += "; or try --select"
            if -gain <= error:
                message += f"; or it is chance, as samples are few: {_needed(heldout, gain, error)}"
            found.append(message)
        elif gain <= error:
            needed = _needed(heldout, gain, error)
            found.append(f"too few samples to tell whether the {named(stored)} helps the base ({numbers}): {needed}")
    best = min(heldout.candidates, key=lambda each: each.loss)
    lead, error = reference.loss - best.loss, best.standard_error_to_corrected
    if best is not stored and best is not none:
        numbers = f"{best.loss:.4f} against {reference.loss:.4f}, difference {lead:.4f} ± {error:.4f}"
        if heldout.chosen is None and lead > error:
            found.append(f"the {named(best)} is better than the corrected one on these data ({numbers}): try --select")
        elif lead <= error:
            needed = _needed(heldout, lead, error)
            found.append(f"too few samples to tell the {named(best)} from the corrected one ({numbers}): {needed}")
    return found


def refusal(heldout: HeldOut) -> str:
    """Why nothing was written, where no LoRA at all was chosen."""
    none = _find(heldout, "none", 0.0)
    best = min((each for each in heldout.candidates if each is not none), key=lambda each: each.loss)
    return (
        f"no LoRA was written: on these data the base is better without any (loss {none.loss:.4f}; the best with one, "
        f"the {named(best)}, {best.loss:.4f}, difference {best.loss - none.loss:.4f} ± "
        f"{best.standard_error_to_none:.4f}): {ADVICE}. Without --select the corrected LoRA is written all the same"
    )


def _find(heldout: HeldOut, adapter: str, scale: float) -> Candidate:
    return next(each for each in heldout.candidates if (each.adapter, each.scale) == (adapter, scale))


def _difference(each: Candidate, other: Candidate, error: float) -> str:
    return f"{each.loss - other.loss:+.4f} ± {error:.4f}"


def named(each: Candidate | Tried) -> str:
    """A LoRA in words."""
    scale = "" if each.scale == 1 else f" at scale {each.scale:g}"
    return f"{NAMES[each.adapter]} LoRA{scale}"


def _samples(heldout: HeldOut) -> str:
    return f"{heldout.data.samples:,} samples"


def _needed(heldout: HeldOut, difference: float, error: float) -> str:
    """A standard error falls with the root of the number of samples."""
    if not difference:
        return "pass more"
    digits = float(f"{heldout.data.samples * (error / difference) ** 2:.1e}")
    return f"pass more than {_samples(heldout)}, some {max(math.ceil(digits), heldout.data.samples + 1):,}"
