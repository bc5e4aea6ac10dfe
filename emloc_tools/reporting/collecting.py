"""Everything that can be reported on, found under given paths, and how one thing was made from another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emloc_tools.errors import EmlocError, InputError
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.json_files import read_json
from emloc_tools.files.plan import PlanV1, read_plan
from emloc_tools.records import Progress, Step, silent
from emloc_tools.reporting import losses
from emloc_tools.reporting.artifacts import selection_of
from emloc_tools.reporting.folders import READERS, is_base, marker_of
from emloc_tools.reporting.inspection import Inspection
from emloc_tools.reporting.losses import Losses
from emloc_tools.reporting.spectra import Spectrum, spectra

DEMO = ("results.json", "commands.sh")  # what marks the folder of a demo


@dataclass(frozen=True)
class Subject:
    """A folder to report on: its name on the page, what it holds, and the bytes of its tensor files.

    `home` is the run's folder that it was found in, to which its own records of paths are relative.
    """

    name: str
    home: Path
    inspection: Inspection
    stored_bytes: int
    spectra: list[Spectrum] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """That `made` says it was made from a `kind` called `said`; `source` is that one's name, if it is reported on.

    `by` is how it is known: a `hash` proves it, a `name` does not, for it may have come to mean another folder.
    """

    made: str
    kind: str
    said: str
    source: str | None
    by: str


@dataclass(frozen=True)
class Report:
    """All that is reported: folders in the order of the method, their links, losses, and plans by their names."""

    subjects: list[Subject]
    links: list[Link]
    losses: list[Losses]
    plans: dict[str, PlanV1]


ORDER = ("base", "base with a head", "calibration", "emulator", "dense emulator", "adapter", "merged model")


def collect(paths: Sequence[Path], *, progress: Progress = silent) -> Report:
    """Read what `paths` name: our folders, LoRAs, bases, files of `plan` and of `evaluate --json`, or folders of these.

    Raises `InputError` for a path with nothing to report on, `FormatError` for what breaks its format.
    """
    found = list(dict.fromkeys(item for path in paths for item in _below(path)))
    names = _names([path for path, _ in found])
    subjects: list[Subject] = []
    measured: list[Losses] = []
    plans: dict[str, PlanV1] = {}
    for done, (path, home) in enumerate(found, 1):
        name = names[path]
        if path.is_dir():
            subject = _subject(name, path, home)
            subjects.append(subject)
            measured += _chosen(subject)
        elif path.name == DEMO[0] and _is_demo(path.parent):
            measured.append(losses.of_demo(path))
        elif losses.is_evaluation(value := read_json(path, "evaluation")):
            measured.append(losses.of_evaluation(name, value))
        else:
            plans[name] = read_plan(path)
        progress(Step("read", done, len(found), name))
    subjects.sort(key=lambda each: (ORDER.index(each.inspection.kind), each.inspection.facts.get("corrected", False)))
    return Report(subjects, list(_links(subjects)), measured, plans)


def _below(path: Path) -> Iterator[tuple[Path, Path]]:
    """The folders and files to report on that a path names, each with the folder that its records are relative to."""
    if path.is_file():
        if not _is_reportable_file(path):
            raise InputError(
                f"{path} is neither a plan (plan --save) nor what evaluate --json prints; report takes these files "
                "and folders"
            )
        yield path, path.parent
    elif marker_of(path) is not None or is_base(path):
        yield path, path.parent
    elif path.is_dir():
        children = sorted(child for child in path.iterdir() if not child.name.startswith("."))
        folders = [child for child in children if child.is_dir() and (marker_of(child) or is_base(child))]
        files = [child for child in children if child.is_file() and _is_reportable_file(child)]
        if not folders and not files:
            raise InputError(
                f"{path} holds nothing to report on: neither one of {', '.join(READERS)}, nor folders with these, "
                "nor a plan or the JSON of evaluate"
            )
        yield from ((child, path) for child in [*folders, *files])
    else:
        raise InputError(f"{path} does not exist; report takes folders of emloc-tools, and a folder of such folders")


def _is_reportable_file(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    if path.name == DEMO[0] and _is_demo(path.parent):
        return True
    try:
        value = read_json(path, "JSON")
    except EmlocError:
        return False
    return value.get("format") == "emloc-plan" or losses.is_evaluation(value)


def _is_demo(folder: Path) -> bool:
    return all((folder / name).is_file() for name in DEMO)


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """The last part of each path, and the whole path where others end alike."""
    paths = list(paths)
    last = [Path(os.path.abspath(path)).name for path in paths]  # noqa: PTH100 - of `.`, and links are left as named
    return {path: name if last.count(name) == 1 else str(path) for path, name in zip(paths, last, strict=True)}


def _subject(name: str, path: Path, home: Path) -> Subject:
    marker = marker_of(path)
    # Of a base nothing is needed but that it is there: models of its kind may be unknown here.
    inspection = READERS[marker](path) if marker is not None else Inspection("base", path, {})
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return Subject(name, home, inspection, stored, list(spectra(path)) if inspection.kind == "emulator" else [])


def _chosen(subject: Subject) -> Iterator[Losses]:
    """The losses by which an adapter was chosen."""
    if subject.inspection.facts.get("chosen") is not None:
        adapter = open_adapter(subject.inspection.path)
        adapter.close()
        selection = selection_of(adapter.manifest)
        if selection is not None:
            yield losses.of_selection(subject.name, selection)


def _links(subjects: Sequence[Subject]) -> Iterator[Link]:
    by_hash = {each.inspection.hash: each.name for each in subjects if each.inspection.hash is not None}
    for each in subjects:
        base = each.inspection.facts.get("base")
        if isinstance(base, str):
            source = _named(base, each, subjects)
            if source is not None:
                kind = _kind_of(source, subjects)
            else:  # what a trainer calls the base may be an emulator
                kind = "model" if each.inspection.made_by is None else "base"
            yield Link(each.name, kind, base, source, "name")
        for kind, digest in each.inspection.made_from.items():
            yield Link(each.name, kind, digest, by_hash.get(digest), "hash")


def _named(said: str, by: Subject, subjects: Sequence[Subject]) -> str | None:
    """The folder that a recorded path leads to, from the run's folder or from here."""
    try:
        places = {(by.home / said).resolve(), Path(said).resolve()}
        return next((each.name for each in subjects if each.inspection.path.resolve() in places), None)
    except (OSError, ValueError, RuntimeError):  # names that no path can have
        return None


def _kind_of(name: str, subjects: Sequence[Subject]) -> str:
    return next(each.inspection.kind for each in subjects if each.name == name)
