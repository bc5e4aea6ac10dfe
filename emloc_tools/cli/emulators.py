"""How a new emulator is shown, by the two commands that write one."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Console

from emloc_tools.cli import console, options

if TYPE_CHECKING:
    from emloc_tools.files.emulator_writer import WrittenEmulator
    from emloc_tools.files.manifest import FactoredStack, WeightingRecord

ROWS = 12  # layers shown after building; `inspect` shows all


def draw(out: Console, written: WrittenEmulator) -> None:
    """Size, errors and the layers with the largest error."""
    manifest = written.manifest
    errors = {name: layer.relative_error for name, layer in manifest.layers.items()}
    stacks = _stacks(written)
    errors |= {name: max(expert.relative_error for expert in stack.experts) for name, stack in stacks.items()}
    part = manifest.parameters / manifest.base_parameters
    rows: list[tuple[str, Any]] = [
        ("base", f"{manifest.base.id} ({manifest.base.architecture})"),
        ("parameters", f"{manifest.parameters:,} of {manifest.base_parameters:,} ({part:.0%})"),
        ("size", console.size(written.nbytes)),
        ("factored", f"{_factored(written)}, ranks by {manifest.allocation} allocation"),
        (
            "relative error",
            f"mean {console.fraction(mean(errors.values()))}, largest {console.fraction(max(errors.values()))} of a "
            f"layer's {_measured(written)}",
        ),
    ]
    weighting = _weighting(written)
    if weighting is not None:
        weighted = f"by the loss gradient in {len(weighting.sensitivity)} layers, damping {weighting.damping:g}"
        rows.append(("weighting", weighted))
    if manifest.calibration is None:
        rows.append(
            ("calibration", "none: every layer is the plain SVD of its weight; calibrated factors are far better")
        )
    if written.left_dense:
        rows.append(("left dense", f"{len(written.left_dense)} layers that factors would not make smaller"))
    unrouted = sum(expert.tokens == 0 for stack in stacks.values() for expert in stack.experts)
    if unrouted and manifest.calibration is not None:
        rows.append(("no tokens", f"{unrouted} matrices of experts that no token was routed to are plain SVDs"))
    short = [name for name, layer in manifest.layers.items() if layer.energetic < layer.rank]
    if short:
        rows.append(("filled", f"{len(short)} layers had fewer directions in the data than ranks, such as {short[0]}"))
    rows.append(("next", "train a LoRA on it with any trainer (trust_remote_code=True), save it to LORA, then"))
    correct = ("correct", "--emulator", written.folder, "--adapter", "LORA", "--base", manifest.base.id)
    rows.append(("", console.Verbatim(options.runnable(*correct, "--output", "CORRECTED"))))
    console.facts(out, f"Emulator in {written.folder}", rows)
    worst = sorted(errors, key=lambda name: -errors[name])[:ROWS]
    out.print()
    console.heading(out, f"Largest errors ({len(worst)} of {len(errors)} layers)")
    table = [
        {
            "layer": name,
            "out": record.out_features,
            "in": record.in_features,
            "rank": record.rank,
            "relative error": errors[name],
        }
        for name in worst
        for record in [manifest.layers.get(name) or stacks[name]]
    ]
    console.layer_table(out, table, bars=["relative error"])
    if len(worst) < len(errors):
        console.line(out, f"All: {options.runnable('inspect', written.folder)}")


def _factored(written: WrittenEmulator) -> str:
    """How much is held as factors."""
    layers, stacks = len(written.manifest.layers), _stacks(written)
    if not stacks:
        return f"{layers} layers"
    experts = sum(len(stack.experts) for stack in stacks.values())
    return f"{layers} layers, and {experts} matrices of experts in {len(stacks)} stacks, which take no LoRA"


def _stacks(written: WrittenEmulator) -> dict[str, FactoredStack]:
    """The factored experts: a field that only manifests of emulators with some have."""
    return getattr(written.manifest, "experts", {})


def _measured(written: WrittenEmulator) -> str:
    """What relative errors are parts of."""
    if written.manifest.calibration is None:
        return "weight"
    weighted = ", weighted by the loss gradient" if _weighting(written) else ""
    return f"output on the data{weighted}"


def _weighting(written: WrittenEmulator) -> WeightingRecord | None:
    """How errors were weighted: a field that only manifests of weighted emulators have."""
    return getattr(written.manifest, "weighting", None)
