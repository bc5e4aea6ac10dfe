"""`emloc-tools merge-calibration`."""

from __future__ import annotations

from pathlib import Path

import click

from emloc_tools.cli import help, options

EXAMPLE = """Example:

\b
  emloc-tools merge-calibration calibration-0 calibration-1 \\
      --output calibration
"""


@help.command(name="merge-calibration", epilog=EXAMPLE)
@click.argument("parts", nargs=-1, required=True, type=options.FOLDER, metavar="CALIBRATION...")
@options.shard_option
@options.output_options
@options.report_options
def merge_calibration(
    parts: tuple[Path, ...], max_shard_size: int, output: Path, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Add up calibrations of a base made from different data.

    So calibration can be spread over machines: the sum equals one calibration on all data. Give two or more folders.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.merge_calibration import merge_calibration as run

    with console.progress(hidden=quiet) as progress:
        result = run(
            parts=parts,
            output=output,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    rows = [
        ("calibrations", result.parts),
        ("samples", result.samples),
        ("tokens", result.tokens),
        ("layers", result.layers),
        ("statistics", f"{result.grams + result.gradients} Gram matrices"),
    ]
    title = f"Merged calibration in {output}"
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: console.facts(out, title, rows))
