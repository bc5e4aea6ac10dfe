"""Write `formats/*/schema.json` from the models in `emloc_tools.files.manifest`: `python -m formats.make_schemas`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Union

from pydantic import TypeAdapter

from emloc_tools.files.manifest import (
    AdapterV1,
    AdapterV2,
    AdapterV3,
    AdapterV4,
    CalibrationV1,
    CalibrationV2,
    CalibrationV3,
    CalibrationV4,
    EmulatorV1,
    EmulatorV2,
    EmulatorV3,
    EmulatorV4,
    EmulatorV5,
    Strict,
)

# The models of the versions 1, 2, … of each format.
MODELS: dict[str, tuple[type[Strict], ...]] = {
    "calibration": (CalibrationV1, CalibrationV2, CalibrationV3, CalibrationV4),
    "emulator": (EmulatorV1, EmulatorV2, EmulatorV3, EmulatorV4, EmulatorV5),
    "adapter": (AdapterV1, AdapterV2, AdapterV3, AdapterV4),
}


def schema_text(name: str) -> str:
    """The JSON Schema of a format's manifest, as the file holds it: of one version, or of exactly one of several."""
    # Of what is written, not of what is accepted: there `format` and `format_version` are required.
    versions: Any = Union[MODELS[name]]  # noqa: UP007 - of as many models as there are
    schema = TypeAdapter(versions).json_schema(mode="serialization")
    if "anyOf" in schema:  # versions exclude each other, for `format_version` is a constant in each
        schema["oneOf"] = schema.pop("anyOf")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_plain(schema)}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _plain(schema: Any) -> Any:
    """Without `discriminator`, which belongs to OpenAPI: its sides are constants that exclude each other anyway."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if isinstance(schema, dict):
        return {key: _plain(value) for key, value in schema.items() if key != "discriminator"}
    return schema


def main() -> None:
    """Renew the schemas of this repository."""
    for name in MODELS:
        path = Path(__file__).parent / name / "schema.json"
        path.write_text(schema_text(name), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
