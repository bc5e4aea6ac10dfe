"""`emloc-tools demo`."""

from __future__ import annotations

from pathlib import Path

import click

from emloc_tools.cli import options

EXAMPLE = """Example:

\b
  emloc-tools demo --output demo-run
"""


@click.command(epilog=EXAMPLE)
@click.option(
    "--base", metavar="BASE", help="A causal language model to use.  [default: the small one shipped with it]"
)
@click.option(
    "--data", type=options.FILE, help="JSONL of your task; a tenth is held out.  [default: C headers of CPython]"
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=80, show_default=True, help="Training steps of every LoRA."
)
@options.output_options
@options.report_options
def demo(
    base: str | None, data: Path | None, steps: int, output: Path, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Run the whole method on this machine: calibrate, build, train, correct, compare.

    Every stage runs in a process of its own and leaves its files in the output folder, as if on separate machines.
    """
    from emloc_tools.cli import console
    from emloc_tools.cli.demo_report import draw
    from emloc_tools.stages.demo import demo as run

    with console.progress(hidden=quiet or as_json) as progress:
        result = run(base=base, data=data, steps=steps, output=output, overwrite=overwrite, progress=progress)
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: draw(out, result))
