"""What one folder holds and where it comes from, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emloc_tools.files.manifest import BaseRecord, MadeBy


@dataclass(frozen=True)
class Inspection:
    """A folder's kind (`calibration`, `emulator`, `adapter`, …), its facts, and a row of values per layer.

    `correction` in the row of a corrected LoRA pair is ‖D‖ / ‖s B'‖, the size of the correction relative to the update.
    `sensitivity` in the row of a weighted layer is what its weighted error is worth to the loss, compared with others.
    `dense` has a row for all parts of a base or an emulator that are not factored: name (with a star for the numbers of
    blocks), how many there are, the parameters of all, and the reason.

    `hash` is what other folders call this one by; None where nothing refers to its kind by a hash. `made_from` maps the
    kinds of what it was made from to their hashes. `made_by` is None where nobody recorded it.
    """

    kind: str
    path: Path
    facts: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    dense: list[dict[str, Any]] = field(default_factory=list)
    hash: str | None = None
    made_from: dict[str, str] = field(default_factory=dict)
    made_by: MadeBy | None = None


def of_base(record: BaseRecord) -> dict[str, Any]:
    """The facts that every folder has of its base."""
    revision = {"revision": record.revision} if record.revision else {}
    return {"base": record.id, **revision, "architecture": record.architecture}
