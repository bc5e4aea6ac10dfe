"""Read manifests: the version first, then all fields under the model of that version."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from pydantic import ValidationError

from emloc_tools.errors import FormatError
from emloc_tools.files.json_files import parse_json_file, read_bytes, whole_number
from emloc_tools.files.manifest import Strict
from emloc_tools.files.opening import file_inside

Manifest = TypeVar("Manifest", bound=Strict)


def read_manifest(path: Path, models: Sequence[type[Manifest]], *, rules: tuple[str, str, str]) -> tuple[Manifest, str]:
    """Read and check a manifest; returns it with the hash of the file's bytes.

    `models` are those of the versions 1, 2, … of one format. `rules` are numbered: strict JSON object, format and
    version, fields. The version comes before any other field, so that a later version is called that and not a damaged
    file.
    """
    readable, known, fields = rules
    data = read_bytes(file_inside(path.parent, path.name, readable), readable)
    value = parse_json_file(path, data, readable)
    model = _model_of(path, value, models, known)
    try:
        return model.model_validate(value), f"xxh3_128:{xxhash.xxh3_128(data).hexdigest()}"
    except ValidationError as error:
        place, message = _first(error, value)
        raise FormatError(fields, path, place, message) from None


def _model_of(path: Path, value: dict[str, Any], models: Sequence[type[Manifest]], rule: str) -> type[Manifest]:
    """The model of the version that a manifest says it has."""
    name, expected = value.get("format"), models[0].model_fields["format"].default
    if name != expected:
        raise FormatError(
            rule, path, "format", f"is {reprlib.repr(name)}; this version of emloc-tools reads {expected!r}"
        )
    found, newest = value.get("format_version"), len(models)
    if not whole_number(found) or not 1 <= found <= newest:
        remedy = "; update emloc-tools to read it" if whole_number(found) and found > newest else ""
        reads = " and ".join(map(str, range(1, newest + 1)))
        message = f"is {reprlib.repr(found)}; this version of emloc-tools reads {reads}{remedy}"
        raise FormatError(rule, path, "format_version", message)
    model = models[found - 1]
    if found > 1:
        added = model.model_fields.keys() - models[found - 2].model_fields.keys()
        for field in sorted(added - value.keys()):
            message = f"is {found}, the version of folders with the field `{field}`, which is not there"
            raise FormatError(rule, path, "format_version", message)
    return model


def _first(error: ValidationError, value: dict[str, Any]) -> tuple[str, str]:
    """The place and the message of the first error, in terms of the manifest."""
    first = error.errors()[0]
    place, message = _place(value, first["loc"]), first["msg"]
    if first["type"].startswith("union_tag"):  # the field that tells one kind of entry from another
        place.append(first["ctx"]["discriminator"].strip("'"))
        known = first["ctx"].get("expected_tags")
        message = f"Input should be one of {known}" if known else "Field required"
    return ".".join(place), message


def _place(value: Any, location: tuple[int | str, ...]) -> list[str]:
    """Where in the JSON `value` an error is, without the choices between models that pydantic puts in between."""
    place = []
    for number, key in enumerate(location, 1):
        inside = (isinstance(value, dict) and key in value) or (isinstance(value, list) and isinstance(key, int))
        if inside:
            value = value[key]
        if inside or number == len(location):
            place.append(str(key))
    return place
