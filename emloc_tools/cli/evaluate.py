"""`emloc-tools evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.evaluate import Evaluation

EXAMPLE = """Example:

\b
  emloc-tools evaluate --base meta-llama/Llama-3.1-8B --adapter corrected \\
      --data heldout.jsonl
"""


@help.command(epilog=EXAMPLE)
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
    """Measure loss and accuracy, with and without LoRAs.

    Give --base, --emulator or both; every --adapter is tried on each (a corrected one on the base alone). Of a prompt
    and completion, the completion counts; of a text for a sequence classifier, its label; of a denoiser's recorded
    inputs, the squared error to their targets. Models are read block by block and may be larger than memory. A pass
    over the model is for all LoRAs, but for 65,000 tokens at most, which count once for every LoRA and once without.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.evaluate import evaluate as run

    with console.progress(hidden=quiet) as progress:
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
    _warn(results, quiet)


def _draw(out: Console, results: Sequence[Evaluation]) -> None:
    from emloc_tools.cli import console

    answers = any(result.exact for result in results)  # whole texts are never predicted to the last token
    rows = [
        {
            "model": result.model,
            "adapter": result.adapter or "none",
            "loss": f"{result.loss:.4f}",
            **_counted(result, answers),
        }
        for result in results
    ]
    numbers = ["loss", "perplexity", "token accuracy", "exact", "tokens", "accuracy", "samples", "entries"]
    console.layer_table(out, rows, to_right=numbers)


def _counted(result: Evaluation, answers: bool) -> dict[str, str]:
    if result.accuracy is None or result.exact is None:
        return {"entries": f"{result.tokens:,}"}
    if result.predicts == "labels":
        return {"accuracy": f"{result.accuracy:.1%}", "samples": f"{result.tokens:,}"}
    return {
        "perplexity": f"{result.perplexity:.4g}",
        "token accuracy": f"{result.accuracy:.1%}",
        **({"exact": f"{result.exact:.1%}"} if answers else {}),
        "tokens": f"{result.tokens:,}",
    }


def _warn(results: Sequence[Evaluation], quiet: bool) -> None:
    """A LoRA that makes the base worse is the one thing that must not be overlooked."""
    from emloc_tools.cli import console

    without = {result.model: result.loss for result in results if result.adapter is None}
    for result in results:
        if result.adapter is not None and result.model == "base" and result.loss >= without["base"]:
            advice = "refine it, try a larger --ratio, calibrate on data of the task itself, and with --gradients"
            if not result.corrected:
                advice = "if it was trained on an emulator, run emloc-tools correct first"
            console.warn(
                f"the base is better without {result.adapter} on these data ({without['base']:.4f} against "
                f"{result.loss:.4f}); {advice}",
                hidden=quiet,
            )
