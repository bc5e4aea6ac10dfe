"""Model folders with a note of ours (merged, exported, with a head). A note is provenance and no format of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emloc_tools.errors import InputError
from emloc_tools.files.exported import NOTE as EXPORTED
from emloc_tools.files.headed import NOTE as HEADED
from emloc_tools.files.json_files import read_json
from emloc_tools.files.manifest import BaseRecord, MadeBy
from emloc_tools.files.merged import NOTE as MERGED
from emloc_tools.reporting.inspection import Inspection, of_base

UNREADABLE = (KeyError, TypeError, ValueError, IndexError)


def merged(path: Path) -> Inspection:
    """What `emloc-merge.json` says; nothing else is checked."""
    note = read_json(path / MERGED, "merge note")
    try:
        facts = {
            **of_base(BaseRecord.model_validate(note["base"])),
            "adapter": note["adapter"]["hash"],
            "corrected": note["adapter"]["corrected"],
            "interpolated": note["interpolate"],
            "merged_tensors": len(note["merged"]),
            "replaced_tensors": len(note["replaced"]),
            "checked": note["checked"],
            "made_by": note["made_by"]["command"],
        }
        sources = _hashes(adapter=note["adapter"]["hash"], emulator=note["emulator"])
        made = MadeBy.model_validate(note["made_by"])
    except UNREADABLE as error:
        raise InputError(f"{path / MERGED} is not what merge writes: {error}") from error
    return Inspection("merged model", path, facts, made_from=sources, made_by=made)


def exported(path: Path) -> Inspection:
    """What `emloc-export.json` says."""
    note = read_json(path / EXPORTED, "export note")
    try:
        facts = {
            **of_base(BaseRecord.model_validate(note["base"])),
            "emulator": note["emulator"],
            "multiplied_tensors": len(note["multiplied"]),
            "made_by": note["made_by"]["command"],
        }
        sources, made = _hashes(emulator=note["emulator"]), MadeBy.model_validate(note["made_by"])
    except UNREADABLE as error:
        raise InputError(f"{path / EXPORTED} is not what export writes: {error}") from error
    return Inspection("dense emulator", path, facts, made_from=sources, made_by=made)


def headed(path: Path) -> Inspection:
    """What `emloc-head.json` says, and the labels of config.json."""
    note, config = read_json(path / HEADED, "head note"), read_json(path / "config.json", "model config")
    try:
        after = note["after"] or note["fitted"]
        facts = {
            **of_base(BaseRecord.model_validate(note["base"])),
            "classifier": config["architectures"][0],
            "labels": list(config["label2id"]),
            "head": note["head"],
            "weight_decay": note["weight_decay"],
            "fitted_samples": note["fitted"]["samples"],
            "held_out_samples": note["after"]["samples"] if note["after"] else 0,
            "loss": after["loss"],
            "accuracy": after["accuracy"],
            "made_by": note["made_by"]["command"],
        }
        made = MadeBy.model_validate(note["made_by"])
    except UNREADABLE as error:
        raise InputError(f"{path / HEADED} is not what fit-head writes: {error}") from error
    return Inspection("base with a head", path, facts, made_by=made)


def _hashes(**found: Any) -> dict[str, str]:
    return {kind: value for kind, value in found.items() if isinstance(value, str)}
