"""`emloc-tools evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from emloc_tools.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.evaluate import Evaluation

EXAMPLE = """Example:

\b
  emloc-tools evaluate --base meta-llama/Llama-3.1-8B --adapter corrected --data heldout.jsonl
"""


@click.command(epilog=EXAMPLE)
@options.base_options(required=False)
@click.option("--emulator", type=options.FOLDER, help="Evaluate this emulator, too.")
@click.option("--adapter", "adapters", type=options.FOLDER, multiple=True, help="Also with this LoRA; may be repeated.")
@options.data_options(samples=None)
@options.device_options("auto", "Precision of the forward pass.  [default: that of the model]")
@options.report_options
def evaluate(
    base: str | None,
    revision: str | None,
    trust_remote_code: bool,
    emulator: Path | None,
    adapters: tuple[Path, ...],
    data: Path,
    samples: int | None,
    max_length: int,
    batch_size: int,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure loss, perplexity and token accuracy of a base or an emulator, with and without LoRAs.

    Models are read once, block by block, and may be larger than memory.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.evaluate import evaluate as run

    with console.progress(hidden=quiet or as_json) as progress:
        results = run(
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            emulator=emulator,
            adapters=adapters,
            data=data,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    value = {"results": [{**console.plain(result), "perplexity": result.perplexity} for result in results]}
    console.emit(value, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, results))


def _draw(out: Console, results: Sequence[Evaluation]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "adapter", "loss", "perplexity", "token accuracy", "tokens"):
        table.add_column(column, justify="left" if column in ("model", "adapter") else "right")
    for result in results:
        table.add_row(
            result.model,
            result.adapter or "-",
            f"{result.loss:.4f}",
            f"{result.perplexity:.3f}",
            f"{result.accuracy:.2%}",
            f"{result.tokens:,}",
        )
    out.print(table)
    without = {result.model: result.loss for result in results if result.adapter is None}
    for result in results:
        if result.adapter is not None and result.model == "base" and result.loss >= without["base"]:
            out.print(
                f"The base is better without {result.adapter} on these data ({without['base']:.4f} against "
                f"{result.loss:.4f}). Try a larger --ratio, or calibrate on data of the task itself.",
                soft_wrap=True,
            )
