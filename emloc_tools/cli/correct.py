"""`emloc-tools correct`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from emloc_tools.cli import help, options
from emloc_tools.errors import EmlocError

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.correct import CorrectionResult

ROWS = 12  # pairs shown; `inspect` shows all
OF_DATA = ("select", "samples", "max_length", "batch_size", "seed", "dtype")  # options without a meaning but for --data

EXAMPLE = """Example:

\b
  emloc-tools correct --emulator emulator --adapter lora \\
      --base meta-llama/Llama-3.1-8B --output corrected

Choose by the loss on samples that the LoRA was not trained on:

\b
  emloc-tools correct --emulator emulator --adapter lora --select \\
      --base meta-llama/Llama-3.1-8B --data heldout.jsonl --output corrected
"""


@help.command(epilog=EXAMPLE)
@click.option("--emulator", type=options.FOLDER, required=True, help="The emulator that the LoRA was trained on.")
@click.option("--adapter", type=options.FOLDER, required=True, help="The trained LoRA, as PEFT or diffusers saves it.")
@options.base_options()
@click.option(
    "--clamp",
    default="3.0",
    show_default=True,
    metavar="NUMBER|none",
    help="Largest correction of a direction, relative to its update; none for no limit.",
)
@click.option(
    "--data",
    type=options.FILE,
    help="Held-out samples, as for evaluate: measure the base on them without a LoRA, with the uncorrected and with "
    "the corrected one. The LoRA must not have been trained on them, which nothing can check.",
)
@click.option(
    "--select",
    is_flag=True,
    help="Choose by the loss on --data: the LoRA corrected or not, at a scale of 0.25 to 1.25. Exits with status 1 and "
    "writes nothing if the base is better without.",
)
@click.option("--samples", type=click.IntRange(min=2), help="How many of --data to use.  [default: all]")
@click.option("--max-length", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per sample.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Samples per batch.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the samples.")
@options.device_options("cpu", "Precision of the base on --data.  [default: that of the model]")
@click.option("--dry-run", is_flag=True, help="Report what would be corrected and write nothing.")
@click.option("--output", type=options.FOLDER, help="Folder to write; needed unless --dry-run.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output of emloc-tools.")
@options.report_options
@click.pass_context
def correct(
    ctx: click.Context,
    emulator: Path,
    adapter: Path,
    base: str,
    revision: str | None,
    trust_remote_code: bool,
    clamp: str,
    data: Path | None,
    select: bool,
    samples: int | None,
    max_length: int,
    batch_size: int,
    seed: int,
    device: str,
    dtype: str,
    dry_run: bool,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fit a LoRA trained on an emulator to its base.

    Reads only the weights that the LoRA touches. The result loads with PEFT, merges and is served as any other. With
    --data it also shows what the LoRA is worth: the base runs block by block and may be larger than memory. It is read
    once for every 65,000 tokens, which count once for every variant of the LoRA and once without.
    """
    from emloc_tools.cli import console, heldout
    from emloc_tools.stages.correct import correct as run

    if output is None and not dry_run:
        raise click.UsageError("Missing option '--output' (or pass --dry-run).")
    if data is None:
        for name in OF_DATA:
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"Option '--{name.replace('_', '-')}' needs '--data'.")
    with console.progress(hidden=quiet) as progress:
        result = run(
            emulator=emulator,
            adapter=adapter,
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            clamp=_clamp(clamp),
            data=data,
            select=select,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            device=device,
            output=None if dry_run else output,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result, base, dry_run))
    if result.head:
        console.warn(
            f"{', '.join(result.head)} of the task's head was trained on the emulator and is passed on as it is; such "
            "a head can drift with the emulator; fit it on the base with emloc-tools fit-head instead, and freeze it",
            hidden=quiet,
        )
    if result.heldout is not None:
        for message in heldout.warnings(result.heldout):
            console.warn(message, hidden=quiet)
        if result.heldout.none_wins:
            raise EmlocError(heldout.refusal(result.heldout))


def _clamp(value: str) -> float | None:
    if value.lower() == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor none", param_hint="--clamp") from None


def _draw(out: Console, result: CorrectionResult, base: str, dry_run: bool) -> None:
    from emloc_tools.cli import console, heldout

    layers = result.layers
    clamped = sum(layer.clamped for layer in layers.values())
    directions = sum(layer.directions for layer in layers.values())
    rows: list[tuple[str, Any]] = []
    if layers:
        rows.append(
            ("corrected", f"{len(layers)} LoRA pairs, {directions} directions, {clamped} of them clamped"),
        )
    if result.unchanged:
        why = "layers that the emulator keeps dense" if layers else "the LoRA as it was trained"
        why += f", and of what is no {result.component}" if result.component else ""
        rows.append(("passed on", f"{len(result.unchanged)} tensors of {why}"))
    winner = result.heldout.winner if result.heldout is not None else None
    if winner is not None:
        rows.append(("chosen", f"the {heldout.named(winner)}" if winner.scale else "no LoRA at all"))
    if result.output is not None and result.component is not None:
        rows.append(("next", console.Verbatim(f'pipeline.load_lora_weights("{result.output}")')))
    elif result.output is not None and (result.heldout is None or winner is not None):
        data = "HELDOUT.jsonl" if winner is None else "TEST.jsonl"  # a chosen one looks too good where it was chosen
        evaluate = ("evaluate", "--base", base, "--adapter", result.output, "--data", data)
        rows.append(("next", console.Verbatim(options.runnable(*evaluate))))
    nothing = "Dry run: nothing was written" if dry_run else "Nothing was written"
    console.facts(
        out, f"{'Corrected LoRA' if layers else 'LoRA'} in {result.output}" if result.output else nothing, rows
    )
    if result.heldout is not None:
        out.print()
        heldout.draw(out, result.heldout)
    if winner is None or winner.scale:
        _draw_layers(out, result)


def _draw_layers(out: Console, result: CorrectionResult) -> None:
    from emloc_tools.cli import console

    layers = result.layers
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
