"""inspect: what one of our folders holds, and where it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emloc_tools.errors import InputError
from emloc_tools.files.adapter import CONFIG
from emloc_tools.files.calibration import MANIFEST as CALIBRATION
from emloc_tools.files.calibration import Calibration
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_LORA
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.exported import NOTE as EXPORTED
from emloc_tools.files.headed import NOTE as HEADED
from emloc_tools.files.json_files import read_json
from emloc_tools.files.manifest import AdapterV2, BaseRecord, GradientRecord
from emloc_tools.files.merged import NOTE as MERGED
from emloc_tools.stages.model_parts import dense_parts_of_emulator, parts_of_base

BASE = ("config.json", "model_index.json")
HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")


@dataclass(frozen=True)
class Inspection:
    """A folder's kind (`calibration`, `emulator`, `adapter`, …), its facts, and a row of values per layer.

    `correction` in the row of a corrected LoRA pair is ‖D‖ / ‖s B'‖, the size of the correction relative to the update.
    `sensitivity` in the row of a weighted layer is what its weighted error is worth to the loss, compared with others.
    `dense` has a row for all parts of a base or an emulator that are not factored: name (with a star for the numbers of
    blocks), how many there are, the parameters of all, and the reason.
    """

    kind: str
    path: Path
    facts: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    dense: list[dict[str, Any]] = field(default_factory=list)


def inspect(
    path: Path,
    *,
    revision: str | None = None,
    targets: str | None = None,
    exclude: str | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Describe a calibration, an emulator, an adapter or a merged model; structure is checked as on every use.

    Of a base, a folder or a Hub id (`org/name`), it says which layers `targets` and `exclude` choose to become factors,
    and what stays dense for which reason; only there the options mean something. No weights are read or fetched.

    Values are read of a corrected adapter only, to see that they are those that `correct` wrote.

    Raises `InputError` for anything else, `FormatError` for a folder that breaks its format.
    """
    readers: dict[str, Callable[[Path], Inspection]] = {
        CALIBRATION: _calibration,
        EMULATOR: _emulator,
        CONFIG: _adapter,
        DIFFUSERS_LORA: _adapter,
        MERGED: _merged,
        EXPORTED: _exported,
        HEADED: _headed,
    }
    options = {"--revision": revision, "--targets": targets, "--exclude": exclude}
    for marker, reader in readers.items():
        if (path / marker).is_file():
            given = [option for option, value in options.items() if value is not None]
            if given:
                raise InputError(f"{path} holds {marker}; {given[0]} says something of a base only, leave it out")
            return reader(path)
    if any((path / name).is_file() for name in BASE) or (not path.exists() and HUB_ID.fullmatch(str(path))):
        facts, layers, dense = parts_of_base(
            str(path), revision=revision, targets=targets, exclude=exclude, trust_remote_code=trust_remote_code
        )
        return Inspection("base", path, facts, layers, dense)
    found = "is a file" if path.is_file() else f"holds none of {', '.join([*readers, *BASE])}"
    if not path.exists():
        found = "does not exist"
    raise InputError(f"{path} {found}; inspect takes a base, a folder that emloc-tools wrote, or an adapter")


def _calibration(path: Path) -> Inspection:
    calibration = Calibration(path)
    calibration.close()
    manifest = calibration.manifest
    gradients = {record.layers[0]: record for record in manifest.grams if isinstance(record, GradientRecord)}
    facts = {
        **_base(manifest.base),
        "data": [record.model_dump() for record in manifest.data],
        "layers": len(manifest.layers),
        **({"stacks_of_experts": len(calibration.stacks)} if calibration.stacks else {}),
        "grams": len(manifest.grams),
        **({"layers_with_gradients": len(gradients), "loss": calibration.loss} if gradients else {}),
        "gram_bytes": sum(record.features * (record.features + 1) * 2 for record in manifest.grams),
        "unreached_layers": len(manifest.unreached),
        "made_by": manifest.made_by.command,
    }
    rows = [
        {
            "layer": name,
            "out": layer.out_features,
            "in": layer.in_features,
            "statistics": calibration.record(name).side,
            "tokens": calibration.record(name).tokens,
            **({"gradients": gradients[name].side.removesuffix("_gradient")} if name in gradients else {}),
        }
        for name, layer in manifest.layers.items()
    ]
    rows += [_calibrated_stack(calibration, name) for name in calibration.stacks]
    return Inspection("calibration", path, facts, rows)


def _calibrated_stack(calibration: Calibration, name: str) -> dict[str, Any]:
    """A row for all experts of a stack; `tokens` are those of all together."""
    record = calibration.stacks[name]
    reached = [f"{name}.{number}" for number in range(record.experts)]
    reached = [member for member in reached if member not in calibration.manifest.unreached]
    has_gradients = any(member in calibration.gradient_layers for member in reached)
    wide = record.out_features > record.in_features
    return {
        "layer": name,
        "out": record.out_features,
        "in": record.in_features,
        "statistics": calibration.record(reached[0]).side,
        "tokens": sum(calibration.record(member).tokens for member in reached),
        **({"gradients": "input" if wide else "output"} if has_gradients else {}),
        "experts": record.experts,
        "without_tokens": record.experts - len(reached),
    }


def _emulator(path: Path) -> Inspection:
    emulator = Emulator(path)
    emulator.close()
    manifest = emulator.manifest
    calibrated = manifest.calibration
    sensitivity = emulator.weighting.sensitivity if emulator.weighting else {}
    factored = [*manifest.layers, *emulator.stacks]
    of_dense, dense = dense_parts_of_emulator(path, manifest.base.architecture, factored)
    facts = {
        **_base(manifest.base),
        "parameters": manifest.parameters,
        "base_parameters": manifest.base_parameters,
        "allocation": manifest.allocation,
        **_weighting(emulator),
        "calibration": calibrated and calibrated.hash,
        "data": [record.model_dump() for record in calibrated.data] if calibrated else [],
        "factored_layers": len(manifest.layers),
        **({"stacks_of_experts": len(emulator.stacks)} if emulator.stacks else {}),
        **of_dense,
        "made_by": manifest.made_by.command,
    }
    rows = [
        {
            "layer": name,
            "out": layer.out_features,
            "in": layer.in_features,
            "rank": layer.rank,
            "relative_error": layer.relative_error,
            **({"sensitivity": sensitivity[name]} if name in sensitivity else {}),
        }
        for name, layer in manifest.layers.items()
    ]
    rows += [_factored_stack(emulator, name) for name in emulator.stacks]
    return Inspection("emulator", path, facts, rows, dense)


def _factored_stack(emulator: Emulator, name: str) -> dict[str, Any]:
    """A row for all experts of a stack, with the largest error of any."""
    record = emulator.stacks[name]
    return {
        "layer": name,
        "out": record.out_features,
        "in": record.in_features,
        "rank": record.rank,
        "relative_error": max(expert.relative_error for expert in record.experts),
        "experts": len(record.experts),
        "without_tokens": sum(expert.tokens == 0 for expert in record.experts),
    }


def _weighting(emulator: Emulator) -> dict[str, Any]:
    if emulator.weighting is None:
        return {}
    weighted = len(emulator.weighting.sensitivity)
    return {"weighting": "gradient", "damping": emulator.weighting.damping, "weighted_layers": weighted}


def _adapter(path: Path) -> Inspection:
    adapter = open_adapter(path)
    adapter.close()
    manifest = adapter.manifest
    facts: dict[str, Any] = {
        "corrected": adapter.corrected,
        "base": adapter.config.get("base_model_name_or_path"),
        "lora_pairs": len(adapter.loras),
        "other_tensors": len(adapter.other_tensors),
    }
    if manifest is not None:
        facts |= {**_base(manifest.base), "clamp": manifest.clamp, "made_by": manifest.made_by.command}
    if isinstance(manifest, AdapterV2):
        chosen = manifest.selection.candidates[manifest.selection.chosen]
        facts |= {"chosen": f"{chosen.adapter} at scale {chosen.scale:g}", "held_out_loss": chosen.loss}
    rows = []
    for name, keys in adapter.loras.items():
        row: dict[str, Any] = {"layer": name, "rank": keys.rank, "scaling": keys.scaling}
        if manifest is not None and name in manifest.layers:
            record = manifest.layers[name]
            size = record.delta_norm / record.update_norm if record.update_norm else 0.0
            row |= {"correction": size, "clamped": record.clamped}
        rows.append(row)
    return Inspection("adapter", path, facts, rows)


def _merged(path: Path) -> Inspection:
    """What `emloc-merge.json` says. It is provenance and no format of its own, so nothing else is checked."""
    note = read_json(path / MERGED, "merge note")
    try:
        facts = {
            **_base(BaseRecord.model_validate(note["base"])),
            "adapter": note["adapter"]["hash"],
            "corrected": note["adapter"]["corrected"],
            "interpolated": note["interpolate"],
            "merged_tensors": len(note["merged"]),
            "replaced_tensors": len(note["replaced"]),
            "checked": note["checked"],
            "made_by": note["made_by"]["command"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / MERGED} is not what merge writes: {error}") from error
    return Inspection("merged model", path, facts)


def _exported(path: Path) -> Inspection:
    """What `emloc-export.json` says, which is provenance and no format."""
    note = read_json(path / EXPORTED, "export note")
    try:
        facts = {
            **_base(BaseRecord.model_validate(note["base"])),
            "emulator": note["emulator"],
            "multiplied_tensors": len(note["multiplied"]),
            "made_by": note["made_by"]["command"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / EXPORTED} is not what export writes: {error}") from error
    return Inspection("dense emulator", path, facts)


def _headed(path: Path) -> Inspection:
    """What `emloc-head.json` says, which is provenance and no format, and the labels of config.json."""
    note, config = read_json(path / HEADED, "head note"), read_json(path / "config.json", "model config")
    try:
        after = note["after"] or note["fitted"]
        facts = {
            **_base(BaseRecord.model_validate(note["base"])),
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
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path / HEADED} is not what fit-head writes: {error}") from error
    return Inspection("base with a head", path, facts)


def _base(record: BaseRecord) -> dict[str, Any]:
    revision = {"revision": record.revision} if record.revision else {}
    return {"base": record.id, **revision, "architecture": record.architecture}
