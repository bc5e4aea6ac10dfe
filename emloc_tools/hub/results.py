"""What was measured of an artifact, as the sections of its card."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, median

from emloc_tools.files.emulator_writer import factored_stacks
from emloc_tools.files.manifest import AdapterManifest, EmulatorManifest, Selection
from emloc_tools.hub.artifact import Artifact
from emloc_tools.hub.text import prose, table
from emloc_tools.wording import fraction

EVALUATE = (
    "Nothing was recorded of what it is worth. Measure it on samples that it was not trained on, with "
    "`emloc-tools evaluate`."
)


def results(artifact: Artifact) -> Iterator[str]:
    """The paragraphs under "Results"; none for a calibration, of which there is nothing to measure."""
    manifest = artifact.manifest
    if isinstance(manifest, EmulatorManifest):
        yield "## Results"
        yield from _emulator(manifest)
    elif isinstance(manifest, AdapterManifest):
        yield "## Results"
        yield from _adapter(manifest)


def _emulator(manifest: EmulatorManifest) -> Iterator[str]:
    stacks = factored_stacks(manifest)
    errors = [layer.relative_error for layer in manifest.layers.values()]
    errors += [expert.relative_error for stack in stacks.values() for expert in stack.experts]
    ranks = [layer.rank for layer in manifest.layers.values()] + [stack.rank for stack in stacks.values()]
    part = manifest.parameters / manifest.base_parameters
    rows = [
        ("parameters", f"{manifest.parameters:,} of {manifest.base_parameters:,} ({part:.0%})"),
        ("factored layers", f"{len(manifest.layers):,}"),
        *([("factored matrices of experts", f"{len(errors) - len(manifest.layers):,}")] if stacks else []),
        ("ranks", str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"),
        ("relative error, mean", fraction(mean(errors))),
        ("relative error, largest", fraction(max(errors))),
    ]
    yield table(("", ""), rows)
    yield (
        "The relative error is the part of a layer's "
        + ("outputs, on the calibration data," if manifest.calibration else "weight")
        + " that is lost. It does not tell what a LoRA will be worth on the base."
    )


def _adapter(manifest: AdapterManifest) -> Iterator[str]:
    selection: Selection | None = getattr(manifest, "selection", None)  # fields of some versions
    refinements = getattr(manifest, "refinements", [])
    if selection is not None:
        data = selection.data
        yield f"Loss of the base in nats on {prose(data.file)}, {data.samples:,} samples, {data.tokens:,} tokens:"
        yield table(("LoRA", "scale", "loss", "standard error"), _candidates(selection))
        yield (
            "The LoRA was chosen on these samples, so it looks a little too good on them."
            + (" It was refined afterwards." if refinements else "")
        )
    for refinement in refinements:
        steps = ", ".join(f"{loss:.4f}" for loss in refinement.losses)
        yield (
            f"Refined on the base with {prose(refinement.data.file)}, {refinement.samples_per_step} samples a step. "
            f"Loss before each step, on its samples: {steps}."
        )
    sizes = [layer.delta_norm / layer.update_norm for layer in manifest.layers.values() if layer.update_norm]
    if sizes:
        clamped = sum(layer.clamped for layer in manifest.layers.values())
        yield (
            f"Corrections, relative to what was trained: median {fraction(median(sizes))}, largest "
            f"{fraction(max(sizes))}; {clamped} directions clamped."
        )
    if selection is None and not refinements:
        yield EVALUATE


def _candidates(selection: Selection) -> Iterator[tuple[str, ...]]:
    for place, each in enumerate(selection.candidates):
        name = ("no LoRA" if each.adapter == "none" else each.adapter) + (
            " (this one)" if place == selection.chosen else ""
        )
        scale = "" if each.adapter == "none" else f"{each.scale:g}"
        yield name, scale, f"{each.loss:.4f}", f"{each.standard_error:.4f}"
