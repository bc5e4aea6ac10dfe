"""The three formats as inspections: calibrations, emulators and adapters, by their own readers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from emloc_tools.files.calibration import Calibration
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.manifest import AdapterManifest, GradientRecord, Refinement, Selection
from emloc_tools.reporting.inspection import Inspection, of_base
from emloc_tools.reporting.model_parts import dense_parts_of_emulator


def calibration(path: Path) -> Inspection:
    """A calibration; the values of its matrices are not read."""
    opened = Calibration(path)
    opened.close()
    manifest = opened.manifest
    gradients = {record.layers[0]: record for record in manifest.grams if isinstance(record, GradientRecord)}
    facts = {
        **of_base(manifest.base),
        "data": [record.model_dump() for record in manifest.data],
        "layers": len(manifest.layers),
        **({"stacks_of_experts": len(opened.stacks)} if opened.stacks else {}),
        "grams": len(manifest.grams),
        **({"layers_with_gradients": len(gradients), "loss": opened.loss} if gradients else {}),
        "gram_bytes": sum(record.features * (record.features + 1) * 2 for record in manifest.grams),
        "unreached_layers": len(manifest.unreached),
        "made_by": manifest.made_by.command,
    }
    rows = [
        {
            "layer": name,
            "out": layer.out_features,
            "in": layer.in_features,
            "statistics": opened.record(name).side,
            "tokens": opened.record(name).tokens,
            **({"gradients": gradients[name].side.removesuffix("_gradient")} if name in gradients else {}),
        }
        for name, layer in manifest.layers.items()
    ]
    rows += [_calibrated_stack(opened, name) for name in opened.stacks]
    return Inspection("calibration", path, facts, rows, hash=opened.hash, made_by=manifest.made_by)


def _calibrated_stack(opened: Calibration, name: str) -> dict[str, Any]:
    """A row for all experts of a stack; `tokens` are those of all together."""
    record = opened.stacks[name]
    reached = [f"{name}.{number}" for number in range(record.experts)]
    reached = [member for member in reached if member not in opened.manifest.unreached]
    has_gradients = any(member in opened.gradient_layers for member in reached)
    wide = record.out_features > record.in_features
    return {
        "layer": name,
        "out": record.out_features,
        "in": record.in_features,
        "statistics": opened.record(reached[0]).side,
        "tokens": sum(opened.record(member).tokens for member in reached),
        **({"gradients": "input" if wide else "output"} if has_gradients else {}),
        "experts": record.experts,
        "without_tokens": record.experts - len(reached),
    }


def emulator(path: Path) -> Inspection:
    """An emulator; the values of its factors are not read."""
    opened = Emulator(path)
    opened.close()
    manifest = opened.manifest
    calibrated = manifest.calibration
    sensitivity = opened.weighting.sensitivity if opened.weighting else {}
    factored = [*manifest.layers, *opened.stacks]
    of_dense, dense = dense_parts_of_emulator(path, manifest.base.architecture, factored)
    facts = {
        **of_base(manifest.base),
        "parameters": manifest.parameters,
        "base_parameters": manifest.base_parameters,
        "allocation": manifest.allocation,
        **_weighting(opened),
        "calibration": calibrated and calibrated.hash,
        "data": [record.model_dump() for record in calibrated.data] if calibrated else [],
        "factored_layers": len(manifest.layers),
        **({"stacks_of_experts": len(opened.stacks)} if opened.stacks else {}),
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
    rows += [_factored_stack(opened, name) for name in opened.stacks]
    sources = {"calibration": calibrated.hash} if calibrated else {}
    return Inspection("emulator", path, facts, rows, dense, opened.hash, sources, manifest.made_by)


def _factored_stack(opened: Emulator, name: str) -> dict[str, Any]:
    """A row for all experts of a stack, with the largest error of any."""
    record = opened.stacks[name]
    return {
        "layer": name,
        "out": record.out_features,
        "in": record.in_features,
        "rank": record.rank,
        "relative_error": max(expert.relative_error for expert in record.experts),
        "experts": len(record.experts),
        "without_tokens": sum(expert.tokens == 0 for expert in record.experts),
    }


def _weighting(opened: Emulator) -> dict[str, Any]:
    if opened.weighting is None:
        return {}
    weighted = len(opened.weighting.sensitivity)
    return {"weighting": "gradient", "damping": opened.weighting.damping, "weighted_layers": weighted}


def adapter(path: Path) -> Inspection:
    """A LoRA, as it was trained or corrected. All its values are read for its hash; it is small."""
    opened = open_adapter(path)
    try:
        digest = opened.hash
        parameters = sum(math.prod(opened.tensors.spec(name).shape) for name in opened.tensors.names())
    finally:
        opened.close()
    manifest = opened.manifest
    facts: dict[str, Any] = {
        "corrected": opened.corrected,
        "base": opened.config.get("base_model_name_or_path"),
        "lora_pairs": len(opened.loras),
        "other_tensors": len(opened.other_tensors),
        "parameters": parameters,
    }
    if manifest is not None:
        facts |= {**of_base(manifest.base), "clamp": manifest.clamp, "made_by": manifest.made_by.command}
    selection = selection_of(manifest)
    if selection is not None:
        chosen = selection.candidates[selection.chosen]
        facts |= {"chosen": f"{chosen.adapter} at scale {chosen.scale:g}", "held_out_loss": chosen.loss}
    losses = [step.losses for step in refinements_of(manifest)]
    if losses:
        facts["refinement_steps"] = sum(map(len, losses))
        facts["loss_before_steps"] = ", ".join(f"{loss:.4f}" for step in losses for loss in step)
    rows = []
    for name, keys in opened.loras.items():
        row: dict[str, Any] = {"layer": name, "rank": keys.rank, "scaling": keys.scaling}
        if manifest is not None and name in manifest.layers:
            record = manifest.layers[name]
            size = record.delta_norm / record.update_norm if record.update_norm else 0.0
            row |= {"correction": size, "clamped": record.clamped, "directions": record.directions}
        rows.append(row)
    made = manifest.made_by if manifest is not None else None
    return Inspection("adapter", path, facts, rows, hash=digest, made_from=_sources(manifest), made_by=made)


def selection_of(manifest: AdapterManifest | None) -> Selection | None:
    """How a LoRA was chosen by held-out loss; None of one that was not."""
    return getattr(manifest, "selection", None)  # a field of some versions


def refinements_of(manifest: AdapterManifest | None) -> list[Refinement]:
    """The steps that a LoRA was trained on the base, by runs; none of one that was not."""
    return getattr(manifest, "refinements", [])  # a field of one version


def _sources(manifest: AdapterManifest | None) -> dict[str, str]:
    if manifest is None:
        return {}
    before = [step.adapter for step in refinements_of(manifest)]
    return {
        "emulator": manifest.emulator,
        "trained adapter": manifest.trained_adapter,
        **({"adapter before": before[-1]} if before else {}),
    }
