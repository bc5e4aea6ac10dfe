"""Write `formats/json/*.schema.json`, what `--json` prints, from the results of the stages.

    python -m formats.make_json_schemas

There is one file for every command, and `report-file` for what `report --format json` writes.
"""

from __future__ import annotations

import importlib
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from emloc_tools.cli import main as group
from emloc_tools.reporting.collecting import Report
from emloc_tools.stages.evaluate import Evaluation

FOLDER = Path(__file__).parent / "json"


@dataclass(frozen=True)
class PrintedEvaluation(Evaluation):
    """An evaluation as it is printed: with `perplexity`, exp(loss), which is null for labels."""

    perplexity: float | None = None


@dataclass(frozen=True)
class Evaluations:
    """A result for every model and adapter, models without an adapter first."""

    results: list[PrintedEvaluation]


def printed(command: str) -> Any:
    """The type of what a command prints with --json: its stage's result, but for `evaluate`, which has several."""
    if command == "evaluate":
        return Evaluations
    stage = command.replace("-", "_")
    return typing.get_type_hints(getattr(importlib.import_module(f"emloc_tools.stages.{stage}"), stage))["return"]


def schemas() -> dict[Path, str]:
    """The text of every file."""
    types = {command: printed(command) for command in group.commands} | {"report-file": Report}
    return {FOLDER / f"{name}.schema.json": schema_text(kind) for name, kind in types.items()}


def schema_text(kind: Any) -> str:
    """The JSON Schema of a type's values, in which every field is there, and no other."""
    schema = TypeAdapter(kind).json_schema(mode="serialization")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_closed(schema)}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _closed(schema: Any) -> Any:
    """With all fields required and no others, for a result prints all it has; without OpenAPI's `discriminator`."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items() if key != "discriminator"}
    if isinstance(schema.get("properties"), dict):
        closed |= {"required": list(schema["properties"]), "additionalProperties": False}
    return closed


def main() -> None:
    """Renew the files of this repository."""
    for path, text in schemas().items():
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
