"""Which files of a folder, or of a repository, are an artifact, and whether they are whole."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emloc_tools.errors import InputError
from emloc_tools.files import adapter, calibration, diffusers_lora, emulator, folders, merged
from emloc_tools.files.calibration import Calibration
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.emulator import Emulator, factor_names
from emloc_tools.files.manifest import AdapterManifest, CalibrationManifest, EmulatorManifest
from emloc_tools.files.opening import path_inside
from emloc_tools.records import Library

Kind = Literal["calibration", "emulator", "adapter"]
Seen = Callable[[int, int, str], None]  # done, of how many, what
CARD = "README.md"
MARKERS: dict[str, Kind] = {
    calibration.MANIFEST: "calibration",
    emulator.MANIFEST: "emulator",
    adapter.CONFIG: "adapter",
    diffusers_lora.WEIGHTS: "adapter",
}
PATTERNS: dict[Kind, tuple[str, ...]] = {
    "calibration": folders.CALIBRATION,
    "emulator": (*folders.EMULATOR, "*.py"),  # a base with code of its own has more files than ours
    "adapter": folders.ADAPTER,
}


@dataclass(frozen=True)
class Artifact:
    """A whole artifact. `files` are the names of what belongs to it, without a README.md; `others` is all else there.

    `manifest` is None for a LoRA that was trained and not corrected. `config` is that of an adapter, and `component`
    the part of a pipeline that it is for. `pairs` counts those of a LoRA.
    """

    kind: Kind
    folder: Path
    files: tuple[str, ...]
    others: tuple[str, ...]
    library: Library
    manifest: CalibrationManifest | EmulatorManifest | AdapterManifest | None
    config: dict[str, Any]
    component: str | None = None
    pairs: int = 0


def kind_of(names: Iterable[str]) -> Kind | None:
    """What a folder or repository with files of these names holds; None for nothing that can be pushed or pulled."""
    names = set(names)
    return next((kind for marker, kind in MARKERS.items() if marker in names), None)


def files_of(kind: Kind, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names of the files that belong to an artifact, sorted, and all others. A card belongs to none."""
    mine: list[str] = []
    others: list[str] = []
    for name in sorted(names):
        belongs = name != CARD and "/" not in name and any(fnmatch.fnmatchcase(name, p) for p in PATTERNS[kind])
        (mine if belongs else others).append(name)
    return mine, others


def examine(folder: Path, seen: Seen = lambda done, total, what: None) -> Artifact:
    """Read a folder to the last value. Raises `InputError` if it holds no artifact, `FormatError` if it is damaged."""
    folders.require_folder(folder, "a calibration, an emulator or an adapter")
    entries = list(folder.iterdir())
    kind = kind_of(path.name for path in entries)
    if kind is None:
        other = "; of a merged model upload the whole folder, with `hf upload`" if _is_merged(folder) else ""
        raise InputError(
            f"{folder} holds none of {', '.join(MARKERS)}; expected the folder of a calibration, an emulator or an "
            f"adapter{other}"
        )
    mine, others = files_of(kind, [path.name for path in entries if path.is_file()])
    others += [f"{path.name}/" for path in sorted(entries) if not path.is_file()]
    for name in mine:
        path_inside(folder, name, "file")  # a link could lead to anything
    read = {"calibration": _calibration, "emulator": _emulator, "adapter": _adapter}[kind]
    return read(folder, (tuple(mine), tuple(name for name in others if name != CARD)), seen)


def _is_merged(folder: Path) -> bool:
    return (folder / merged.NOTE).exists() or (folder / "config.json").exists()


def _calibration(folder: Path, names: tuple[tuple[str, ...], tuple[str, ...]], seen: Seen) -> Artifact:
    opened = Calibration(folder)
    try:
        records = opened.manifest.grams
        for done, record in enumerate(records, 1):
            layer = record.layers[0]
            _ = opened.gradient(layer) if record.side.endswith("_gradient") else opened.gram(layer)
            seen(done, len(records), record.tensor)
    finally:
        opened.close()
    return Artifact("calibration", folder, *names, "transformers", opened.manifest, {})


def _emulator(folder: Path, names: tuple[tuple[str, ...], tuple[str, ...]], seen: Seen) -> Artifact:
    opened = Emulator(folder)
    try:
        layers = [*opened.layers, *opened.stacks]
        factors = {tensor for name in layers for tensor in factor_names(name, stack=name in opened.stacks)}
        parts = [*layers, *(name for name in opened.manifest.tensors if name not in factors)]
        for done, name in enumerate(parts, 1):
            _ = opened.factors(name) if done <= len(layers) else opened.read(name)
            seen(done, len(parts), name)
    finally:
        opened.close()
    return Artifact("emulator", folder, *names, opened.library, opened.manifest, {})


def _adapter(folder: Path, names: tuple[tuple[str, ...], tuple[str, ...]], seen: Seen) -> Artifact:
    opened = open_adapter(folder)
    try:
        stored = opened.tensors.names()
        for done, name in enumerate(stored, 1):
            opened.read(name)
            seen(done, len(stored), name)
    finally:
        opened.close()
    library: Library = "transformers" if opened.component is None else "diffusers"
    return Artifact(
        "adapter", folder, *names, library, opened.manifest, opened.config, opened.component, len(opened.loras)
    )
