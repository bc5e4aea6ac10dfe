"""`emloc-tools refine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.refine import RefinementResult

EXAMPLE = """Example:

\b
  emloc-tools refine --base meta-llama/Llama-3.1-8B --adapter corrected \\
      --data train.jsonl --output refined
"""


@help.command(epilog=EXAMPLE)
@click.option("--adapter", type=options.FOLDER, required=True, help="The LoRA, as correct or refine wrote it.")
@options.base_options()
@options.data_option
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="How many steps to take.")
@click.option(
    "--samples-per-step", type=click.IntRange(min=1), default=64, show_default=True, help="Samples of every step."
)
@click.option(
    "--step-size",
    type=float,
    help="How far a step moves an entry of A or B at most, as a part of their root mean square.  [default: 0.2; "
    "0.05 a step for fewer than 4]",
)
@options.reading_options
@options.device_options("auto", "Precision of the base.  [default: that of the model]")
@options.output_options
@options.report_options
def refine(
    adapter: Path,
    base: str,
    revision: str | None,
    trust_remote_code: bool,
    data: Path,
    steps: int,
    samples_per_step: int,
    step_size: float | None,
    max_length: int,
    batch_size: int,
    seed: int,
    device: str,
    dtype: str,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a corrected LoRA a few steps on the base itself.

    What an emulator cannot show, the base itself does: a few steps of Adam, each with the gradient of many samples,
    take the LoRA there. The base streams by, block by block, twice for every step, and may be larger than memory;
    activations pass through a temporary file beside the output. --data are the samples that the LoRA was trained on.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.refine import refine as run

    with console.progress(hidden=quiet) as progress:
        result = run(
            base=base,
            adapter=adapter,
            data=data,
            output=output,
            revision=revision,
            steps=steps,
            samples_per_step=samples_per_step,
            step_size=step_size,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result, base))
    if result.other_base is not None:
        console.warn(
            f"the LoRA was corrected for {result.other_base}, and refined on {base}; if that is another model, it fits "
            "neither",
            hidden=quiet,
        )


def _draw(out: Console, result: RefinementResult, base: str) -> None:
    from emloc_tools.cli import console

    steps = len(result.losses)
    tokens = f", {result.tokens:,} tokens" if result.tokens > result.samples else ""  # of a denoiser there are none
    evaluate = ("evaluate", "--base", base, "--adapter", result.output, "--data", "HELDOUT.jsonl")
    rows: list[tuple[str, Any]] = [
        ("refined", f"{result.pairs} LoRA pairs in {steps} {'step' if steps == 1 else 'steps'}"),
        ("data", f"{result.samples:,} samples{tokens}"),
        ("read", console.size(result.bytes_read)),
        ("losses", ", ".join(f"{loss:.4f}" for loss in result.losses) + "  (of each step's own samples, before it)"),
        ("next", console.Verbatim(options.runnable(*evaluate))),
    ]
    console.facts(out, f"Refined LoRA in {result.output}", rows)
