"""Values as people read them, the same on the terminal and in reports, and as programs do: in JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

MISSING = "not recorded"


def fraction(value: float) -> str:
    """A number to three decimals, all that means something in errors and ratios; the smallest are not shown as 0."""
    return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def number(value: Any) -> str:
    """A value for people: thousands separated, fractions to four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(number, value))
    return "none" if value is None else str(value)


def size(nbytes: int) -> str:
    """Bytes in a readable unit, base 2."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def plain(value: Any) -> Any:
    """A result as JSON values: dataclasses and manifests become objects, paths strings."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
