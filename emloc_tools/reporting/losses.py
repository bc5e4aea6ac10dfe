"""What was measured on held-out samples: by the demo, by `evaluate --json`, and when a LoRA was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emloc_tools.errors import InputError
from emloc_tools.files.json_files import read_json
from emloc_tools.files.manifest import Selection

Role = Literal["base", "upper bound", "emulator", "uncorrected", "corrected"]
UNITS = {"tokens": "nats per token", "labels": "nats per label", "entries": "mean squared error"}
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Loss:
    """The mean loss of a model with a LoRA or without.

    `role` is what the row is there for: the untouched `base`, the `upper bound` trained on the base itself, the
    `emulator`, or the base with a LoRA from one, `uncorrected` or `corrected`. None is what was not recorded.
    """

    label: str
    role: Role
    loss: float
    standard_error: float | None = None
    accuracy: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Losses:
    """Losses on the same samples, the file that says so, and what they are measured in."""

    name: str
    rows: list[Loss]
    unit: str = "nats per token"


class _Read(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Score(_Read):
    model: Literal["base", "emulator"]
    ratio: Finite | None
    adapter: Literal["none", "trained on the base", "uncorrected", "corrected"]
    loss: Finite
    accuracy: Finite


class _Demo(_Read):
    scores: list[_Score]


class _Evaluation(_Read):
    model: str
    adapter: str | None
    corrected: bool
    loss: Finite
    accuracy: Finite | None
    predicts: Literal["tokens", "labels", "entries"] = "tokens"


class _Evaluations(_Read):
    results: Annotated[list[_Evaluation], Field(min_length=1)]


def of_demo(path: Path) -> Losses:
    """The losses in the demo's `results.json`. Raises `InputError` for anything else."""
    try:
        found = _Demo.model_validate(read_json(path, "results of the demo"))
    except ValidationError as error:
        raise InputError(f"{path} is not what the demo writes: {_first(error)}") from error
    return Losses(path.name, [_of_score(score) for score in found.scores])


def _of_score(score: _Score) -> Loss:
    of_emulator = f" from emulator {score.ratio:g}" if score.ratio is not None else ""
    if score.model == "emulator":
        lora = "" if score.adapter == "none" else " with the LoRA trained on it"
        return Loss(f"emulator {score.ratio:g}{lora}", "emulator", score.loss, accuracy=score.accuracy)
    labels: dict[str, tuple[str, Role]] = {
        "none": ("base", "base"),
        "trained on the base": ("base, LoRA trained on it", "upper bound"),
        "uncorrected": (f"base, LoRA{of_emulator}, uncorrected", "uncorrected"),
        "corrected": (f"base, LoRA{of_emulator}, corrected", "corrected"),
    }
    label, role = labels[score.adapter]
    return Loss(label, role, score.loss, accuracy=score.accuracy)


def is_evaluation(value: dict[str, Any]) -> bool:
    """Whether a JSON object is what `evaluate --json` prints."""
    try:
        _Evaluations.model_validate(value)
    except ValidationError:
        return False
    return True


def of_evaluation(name: str, value: dict[str, Any]) -> Losses:
    """The losses that `evaluate --json` prints. It does not tell a LoRA of an emulator from one of the base itself."""
    results = _Evaluations.model_validate(value).results
    rows = []
    for each in results:
        role: Role = "emulator"
        if each.model == "base":
            role = "base" if each.adapter is None else "corrected" if each.corrected else "uncorrected"
        label = each.model if each.adapter is None else f"{each.model}, {each.adapter}"
        rows.append(Loss(label, role, each.loss, accuracy=each.accuracy))
    return Losses(name, rows, UNITS[results[0].predicts])


def of_selection(name: str, selection: Selection) -> Losses:
    """The losses by which a LoRA was chosen."""
    rows = []
    for place, each in enumerate(selection.candidates):
        role: Role = {"none": "base", "trained": "uncorrected", "corrected": "corrected"}[each.adapter]  # type: ignore[assignment]
        label = "base" if each.adapter == "none" else f"base, LoRA {role}, scale {each.scale:g}"
        rows.append(Loss(label, role, each.loss, each.standard_error, chosen=place == selection.chosen))
    return Losses(name, rows, "nats per token or label")  # which of the two is not recorded


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
