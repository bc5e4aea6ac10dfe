"""Write `formats/*/schema.json` from the models in `emloc_tools.files.manifest`: `python -m formats.make_schemas`."""

from __future__ import annotations

import json
from pathlib import Path

from emloc_tools.files.manifest import AdapterManifest, CalibrationManifest, EmulatorManifest

MODELS = {"calibration": CalibrationManifest, "emulator": EmulatorManifest, "adapter": AdapterManifest}


def schema_text(name: str) -> str:
    """The JSON Schema of a format's manifest, as the file holds it."""
    # Of what is written, not of what is accepted: there `format` and `format_version` are required.
    schema = MODELS[name].model_json_schema(mode="serialization")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Renew the schemas of this repository."""
    for name in MODELS:
        path = Path(__file__).parent / name / "schema.json"
        path.write_text(schema_text(name), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
