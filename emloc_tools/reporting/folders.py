"""Which of our folders a path is: told by the file that only its kind has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emloc_tools.files.adapter import CONFIG
from emloc_tools.files.calibration import MANIFEST as CALIBRATION
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_LORA
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.exported import NOTE as EXPORTED
from emloc_tools.files.headed import NOTE as HEADED
from emloc_tools.files.merged import NOTE as MERGED
from emloc_tools.reporting import artifacts, notes
from emloc_tools.reporting.inspection import Inspection

READERS: dict[str, Callable[[Path], Inspection]] = {
    CALIBRATION: artifacts.calibration,
    EMULATOR: artifacts.emulator,
    CONFIG: artifacts.adapter,
    DIFFUSERS_LORA: artifacts.adapter,
    MERGED: notes.merged,
    EXPORTED: notes.exported,
    HEADED: notes.headed,
}
BASES = ("config.json", "model_index.json")  # of a base, which has none of the markers above


def marker_of(path: Path) -> str | None:
    """The file that tells the kind of one of our folders; None for any other path."""
    return next((marker for marker in READERS if (path / marker).is_file()), None)


def is_base(path: Path) -> bool:
    """Whether a folder is that of a model, and none of ours."""
    return marker_of(path) is None and any((path / name).is_file() for name in BASES)
