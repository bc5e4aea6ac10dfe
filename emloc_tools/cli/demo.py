"""`emloc-tools demo`."""

from __future__ import annotations

from pathlib import Path

import click

from emloc_tools.cli import help, options

EXAMPLE = """Examples:

\b
  emloc-tools demo --output demo-run
  emloc-tools demo --base Qwen/Qwen2.5-0.5B --data mine.jsonl --output demo
"""


@help.command(epilog=EXAMPLE, short_help="Run the whole method on this machine and compare.")
@click.option("--base", metavar="BASE", help="A causal language model.  [default: the small one that is shipped]")
@click.option("--data", type=options.FILE, help="JSONL of your task; a tenth is held out.  [default: C headers]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the base's folder. Off by default.")
@click.option(
    "--ratio",
    "ratios",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    default=(0.25, 0.1),
    show_default=True,
    help="Size of an emulator; may be repeated.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=80, show_default=True, help="Training steps of every LoRA."
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    help="Peak rate of every training.  [default: 2e-4; 6e-3 for the shipped model]",
)
@click.option(
    "--upper-bound/--no-upper-bound",
    default=True,
    show_default=True,
    help="Also train on the base itself, in memory for all of it.",
)
@click.option(
    "--refine-steps",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Steps on the base for the LoRA of the smallest emulator.",
)
@options.output_options
@options.report_options
def demo(
    base: str | None,
    data: Path | None,
    trust_remote_code: bool,
    ratios: tuple[float, ...],
    steps: int,
    learning_rate: float | None,
    upper_bound: bool,
    refine_steps: int,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the whole method on this machine: calibrate, build, train, correct, refine, compare.

    Every stage runs in a process of its own and leaves its files in the output folder, as if on separate machines.
    Needs no download unless --base is on the Hub. The trainer is a plain script of transformers and PEFT.
    """
    from emloc_tools.cli import console
    from emloc_tools.cli.demo_report import draw
    from emloc_tools.stages.demo import demo as run

    with console.progress(hidden=quiet) as progress:
        result = run(
            base=base,
            data=data,
            trust_remote_code=trust_remote_code,
            ratios=ratios,
            steps=steps,
            learning_rate=learning_rate,
            upper_bound=upper_bound,
            refinement=refine_steps,
            output=output,
            overwrite=overwrite,
            progress=progress,
        )
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: draw(out, result))
