"""`emloc-tools truncate`."""

from __future__ import annotations

from pathlib import Path

import click

from emloc_tools.cli import help, options

EXAMPLE = """Example:

\b
  emloc-tools truncate --emulator emulator --ratio 0.1 --output smaller
"""


@help.command(epilog=EXAMPLE)
@click.option("--emulator", type=options.FOLDER, required=True, help="Folder from build-emulator.")
@options.size_options
@options.shard_option
@options.output_options
@options.report_options
def truncate(
    emulator: Path,
    ratio: float | None,
    params: int | None,
    size: int | None,
    max_shard_size: int,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Cut a smaller emulator out of a larger one.

    Needs neither the base nor the data, and equals, up to rounding, a new build of that size; layers that are dense
    stay dense. Exactly one of --ratio, --params and --size is needed; they mean what they mean to build-emulator.
    """
    from emloc_tools.cli import console, emulators
    from emloc_tools.stages.truncate import truncate as run

    with console.progress(hidden=quiet) as progress:
        written = run(
            emulator=emulator,
            ratio=ratio,
            params=params,
            size=size,
            max_shard_size=max_shard_size,
            output=output,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    console.emit(written, as_json=as_json, quiet=quiet, draw=lambda out: emulators.draw(out, written))
