"""The plan of a training: which emulator fits into a given memory (`formats/plan/SPEC.md`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from emloc_tools.errors import FormatError
from emloc_tools.files.json_files import read_json
from emloc_tools.files.manifest import Amount, BaseRecord, Count, MadeBy, Name, Strict
from emloc_tools.files.single import write_file

Fraction = Annotated[float, Field(gt=0, lt=1)]
Size = Annotated[list[Count], Field(min_length=2, max_length=2)]  # height, width in pixels


class Parts(Strict):
    """Bytes in use at the peak: all, and what they are of."""

    total: Amount
    weights: Amount
    training_state: Amount
    activations: Amount
    logits: Amount


class Conditions(Strict):
    """What the step looks like that the plan is for."""

    batch_size: Count
    sequence_length: Count
    images: Amount
    image_size: Size
    resolution: Size
    data: str | None
    dtype: Name
    lora_rank: Count
    lora_targets: list[Name] | None
    lora_dtype: Name
    gradient_checkpointing: bool
    optimizer: Name


class Stage(Strict):
    """About what a stage of emloc-tools needs, in bytes; `scratch` is disk that it gives back."""

    stage: Name
    disk: Amount
    scratch: Amount
    memory: Amount


class Model(Strict):
    """A model to train: its parameters and bytes, and the peak of a training step with a LoRA."""

    parameters: Count
    size: Count
    training: Parts


class PlanV1(Strict):
    """A plan. `ratio` and `emulator` are null where the base itself fits.

    `reserve` bytes of `memory` are left for what is not foreseen. `inference` is a forward pass of the base.
    """

    format: Literal["emloc-plan"] = "emloc-plan"
    format_version: Literal[1] = 1
    made_by: MadeBy
    base: BaseRecord
    targets: str | None
    exclude: str | None
    memory: Count
    reserve: Amount
    ratio: Fraction | None
    factored_layers: Amount
    conditions: Conditions
    emulator: Model | None
    base_model: Model
    inference: Parts
    stages: list[Stage]


def write_plan(path: Path, plan: PlanV1) -> None:
    """Write a plan; it appears under its name only when it is complete."""
    write_file(path, json.dumps(plan.model_dump(mode="json"), indent=2, allow_nan=False) + "\n")


def read_plan(path: Path) -> PlanV1:
    """Read and check a plan. Raises `FormatError` with the number of the rule that it breaks."""
    values = read_json(path, "P1")
    if values.get("format") != "emloc-plan":
        raise FormatError("P2", path, "format", f"is {values.get('format')!r}, expected 'emloc-plan'")
    if values.get("format_version") != 1:
        raise FormatError("P2", path, "format_version", f"is {values.get('format_version')!r}; this release reads 1")
    try:
        plan = PlanV1.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError("P3", path, ".".join(map(str, first["loc"])), first["msg"]) from error
    if (plan.ratio is None) != (plan.emulator is None):
        raise FormatError("P4", path, "ratio", "must be null exactly if emulator is")
    for name, parts in _parts(plan).items():
        if parts.total != parts.weights + parts.training_state + parts.activations + parts.logits:
            raise FormatError("P4", path, f"{name}.total", "is not the sum of its parts")
    return plan


def _parts(plan: PlanV1) -> dict[str, Parts]:
    emulator = {"emulator.training": plan.emulator.training} if plan.emulator else {}
    return {**emulator, "base_model.training": plan.base_model.training, "inference": plan.inference}
