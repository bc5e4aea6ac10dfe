"""`emloc-tools report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.report import Format, WrittenReport

EXAMPLE = """Examples:

\b
  emloc-tools report demo-run --output report.html
  emloc-tools report emulator corrected plan.json --output report.md
"""


@help.command(epilog=EXAMPLE)
@click.argument("paths", nargs=-1, required=True, type=options.FOLDER, metavar="PATH...")
@click.option("--output", type=options.FILE, required=True, help="File to write.")
@click.option(
    "--format",
    type=click.Choice(["html", "json", "md"]),
    help="A page with plots, all values, or text and tables.  [default: by the ending of --output]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@options.report_options
def report(
    paths: tuple[Path, ...], output: Path, format: Format | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Write a page on what folders hold and how they were made.

    A PATH is a calibration, emulator, LoRA, base or merged model, a plan, a file with what evaluate --json prints, or a
    folder with such folders and files, as the demo leaves. The page shows what was made from what, ranks, errors and
    spectra, corrections, losses and memory. It is one file that loads nothing.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.report import report as run

    with console.progress(hidden=quiet) as progress:
        written = run(paths, output=output, format=format, overwrite=overwrite, progress=progress)
    console.emit(written, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, written))


def _draw(out: Console, written: WrittenReport) -> None:
    from emloc_tools.cli import console

    rows = [
        ("folders", written.folders),
        ("sets of losses", written.losses),
        ("plans", written.plans),
        ("size", console.size(written.nbytes)),
    ]
    console.facts(out, f"Report in {written.output}", rows)
