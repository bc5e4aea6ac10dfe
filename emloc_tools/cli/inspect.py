"""`emloc-tools inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from emloc_tools.cli import options

EXAMPLE = """Example:

\b
  emloc-tools inspect emulator
"""


@click.command(epilog=EXAMPLE)
@click.argument("path", type=options.FILE)
@options.report_options
def inspect(path: Path, as_json: bool, quiet: bool) -> None:
    """Show what a calibration, an emulator or an adapter holds, and what it was made from."""
    from emloc_tools.cli import console
    from emloc_tools.stages.inspect import inspect as run

    result = run(path)

    def draw(out: console.Console) -> None:
        console.facts(out, f"{result.kind.capitalize()} in {path}", list(result.facts.items()))
        out.print()
        console.layer_table(out, result.layers, bars=["relative error"])

    console.emit(result, as_json=as_json, quiet=quiet, draw=draw)
