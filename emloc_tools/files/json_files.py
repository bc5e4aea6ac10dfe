"""JSON as the formats define it (`formats/README.md`, "JSON"): stricter than Python's, and bounded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from emloc_tools.errors import FormatError
from emloc_tools.files.opening import open_regular, reason

MAX_JSON = 100_000_000  # bytes; the limit of a safetensors header, taken for every JSON file
MAX_DEPTH = 64  # of nested objects and arrays
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, rule: str, what: str = "") -> dict[str, Any]:
    """A JSON object from a file; anything else is a `FormatError` of `rule`."""
    return parse_json_file(path, read_bytes(path, rule), rule, what)


def read_bytes(path: Path, rule: str, limit: int = MAX_JSON) -> bytes:
    """A whole small file; one that cannot be read or is larger than `limit` bytes is a `FormatError` of `rule`."""
    with open_regular(path, rule) as file:
        blocks: list[bytes] = []
        left = limit + 1
        try:
            while left and (block := file.read(min(left, 1 << 20))):
                blocks.append(block)
                left -= len(block)
        except OSError as error:
            raise FormatError(rule, path, "", f"cannot be read: {reason(error)}") from error
    if not left:
        raise FormatError(rule, path, "", f"is larger than {limit:,} bytes")
    return b"".join(blocks)


def parse_json_file(path: Path, data: bytes, rule: str, what: str = "") -> dict[str, Any]:
    """The JSON object in the bytes `data` of the file `path`; anything else is a `FormatError` of `rule`."""
    try:
        return parse_object(data)
    except ValueError as error:
        raise FormatError(rule, path, what, f"is not strict JSON: {error}") from error


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that `data` holds. Raises `ValueError` for anything that the formats do not allow in JSON."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from error
    if not isinstance(value, dict):
        raise ValueError("it must be one object")
    _check_depth(value)
    if SURROGATE.search(text):
        # Half of a surrogate pair is a character that can be neither stored nor shown. An encodable pair passes.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def whole_number(value: object) -> TypeGuard[int]:
    """Whether a value from JSON is an integer >= 0 that was written as one: not `true`, not `1.0`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for container in level:
            values = container.values() if isinstance(container, dict) else container
            inner += [item for item in values if isinstance(item, (dict, list))]
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
