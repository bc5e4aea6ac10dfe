"""`emloc-tools inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.inspect import Inspection

NAMES = {
    "lora_pairs": "LoRA pairs",
    "base_parameters": "parameters of the base",
    "grams": "Gram matrices",
    "gram_bytes": "their size",
    "correction": "‖D‖/‖sB'‖",
}

EXAMPLE = """Example:

\b
  emloc-tools inspect emulator
"""


@click.command(epilog=EXAMPLE)
@click.argument("path", type=options.FOLDER, metavar="FOLDER")
@options.report_options
def inspect(path: Path, as_json: bool, quiet: bool) -> None:
    """Show what a calibration, emulator or adapter holds.

    Also what it was made from, and a line per layer. Nothing in the folder is executed.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.inspect import inspect as run

    result = run(path)
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result))


def _draw(out: Console, result: Inspection) -> None:
    from emloc_tools.cli import console

    shown = {**result.facts}
    if "gram_bytes" in shown:
        shown["gram_bytes"] = console.size(shown["gram_bytes"])
    if "data" in shown:
        shown["data"] = [_data(record) for record in shown["data"]] or "none: plain SVD of the weights"
    if "made_by" in shown:
        shown["made_by"] = console.Verbatim(shown["made_by"])
    console.facts(
        out,
        f"{result.kind.capitalize()} in {result.path}",
        [(NAMES.get(key, _words(key)), shown[key]) for key in shown],
    )
    out.print()
    rows = [{NAMES.get(key, _words(key)): value for key, value in row.items()} for row in result.layers]
    console.layer_table(out, rows, bars=["relative error"])


def _data(record: dict[str, Any]) -> str:
    return f"{record['file']}: {record['samples']:,} samples, {record['tokens']:,} tokens"


def _words(key: str) -> str:
    return key.replace("_", " ")
