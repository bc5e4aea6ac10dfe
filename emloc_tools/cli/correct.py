"""`emloc-tools correct`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.correct import CorrectionResult

ROWS = 12  # pairs shown; `inspect` shows all

EXAMPLE = """Example:

\b
  emloc-tools correct --emulator emulator --adapter lora \\
      --base meta-llama/Llama-3.1-8B --output corrected
"""


@click.command(epilog=EXAMPLE)
@click.option("--emulator", type=options.FOLDER, required=True, help="The emulator that the LoRA was trained on.")
@click.option("--adapter", type=options.FOLDER, required=True, help="The trained LoRA, as PEFT saves it.")
@options.base_options()
@click.option(
    "--clamp",
    default="3.0",
    show_default=True,
    metavar="NUMBER|none",
    help="Largest correction of a direction, relative to its update; none for no limit.",
)
@options.device_option("cpu")
@click.option("--dry-run", is_flag=True, help="Report what would be corrected and write nothing.")
@click.option("--output", type=options.FOLDER, help="Folder to write; needed unless --dry-run.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output of emloc-tools.")
@options.report_options
def correct(
    emulator: Path,
    adapter: Path,
    base: str,
    revision: str | None,
    trust_remote_code: bool,
    clamp: str,
    device: str,
    dry_run: bool,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fit a LoRA trained on an emulator to its base.

    Reads only the weights that the LoRA touches. The result loads with PEFT, merges and is served as any other.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.correct import correct as run

    if output is None and not dry_run:
        raise click.UsageError("Missing option '--output' (or pass --dry-run).")
    with console.progress(hidden=quiet) as progress:
        result = run(
            emulator=emulator,
            adapter=adapter,
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            clamp=_clamp(clamp),
            device=device,
            output=None if dry_run else output,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result, base))


def _clamp(value: str) -> float | None:
    if value.lower() == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor none", param_hint="--clamp") from None


def _draw(out: Console, result: CorrectionResult, base: str) -> None:
    from emloc_tools.cli import console

    layers = result.layers
    clamped = sum(layer.clamped for layer in layers.values())
    directions = sum(layer.directions for layer in layers.values())
    rows: list[tuple[str, Any]] = [
        ("corrected", f"{len(layers)} LoRA pairs, {directions} directions, {clamped} of them clamped"),
    ]
    if result.unchanged:
        rows.append(("passed on", f"{len(result.unchanged)} tensors of layers that the emulator keeps dense"))
    if result.output is not None:
        evaluate = ("evaluate", "--base", base, "--adapter", result.output, "--data", "HELDOUT.jsonl")
        rows.append(("next", console.Verbatim(options.runnable(*evaluate))))
    title = f"Corrected LoRA in {result.output}" if result.output else "Dry run: nothing was written"
    console.facts(out, title, rows)
    sizes = {name: layer.delta_norm / layer.update_norm for name, layer in layers.items() if layer.update_norm}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:ROWS]
    if not largest:
        return
    out.print()
    console.heading(out, f"Largest corrections D, relative to the update sB' ({len(largest)} of {len(layers)} pairs)")
    table = [
        {"layer": name, "rank": layers[name].rank, "clamped": layers[name].clamped, console.CORRECTION: sizes[name]}
        for name in largest
    ]
    console.layer_table(out, table)
    if len(largest) < len(layers) and result.output is not None:
        console.line(out, f"All: {options.runnable('inspect', result.output)}")
