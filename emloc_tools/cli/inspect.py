"""`emloc-tools inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.reporting.inspection import Inspection

NAMES = {
    "lora_pairs": "LoRA pairs",
    "base_parameters": "parameters of the base",
    "grams": "Gram matrices",
    "gram_bytes": "their size",
    "stored_bytes": "size of its weights",
}
PART = ("count", "parameters", "reason")

EXAMPLE = """Examples:

\b
  emloc-tools inspect emulator
  emloc-tools inspect meta-llama/Llama-3.1-8B
"""


@help.command(epilog=EXAMPLE)
@click.argument("path", type=options.FOLDER, metavar="FOLDER|BASE")
@click.option("--revision", metavar="REV", help="Of a Hub id: branch, tag or commit.")
@options.layer_options
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from a base's folder. Off by default.")
@options.report_options
def inspect(
    path: Path,
    revision: str | None,
    targets: str | None,
    exclude: str | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what a base, calibration, emulator or adapter holds.

    Also what it was made from, and its layers by kinds, with one line for blocks that are alike. Of a base, a folder or
    a Hub id, it shows which layers would become factors, and of base and emulator what is dense and why. Weights are
    neither read nor fetched.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.inspect import inspect as run

    result = run(path, revision=revision, targets=targets, exclude=exclude, trust_remote_code=trust_remote_code)
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result))


def _draw(out: Console, result: Inspection) -> None:
    from emloc_tools.cli import console, layer_groups

    shown = {**result.facts}
    for key in ("gram_bytes", "stored_bytes"):
        if key in shown:
            shown[key] = console.size(shown[key])
    if "dense_by_reason" in shown:
        shown["dense_by_reason"] = [
            f"{console.number(value)}: {reason}" for reason, value in shown["dense_by_reason"].items()
        ]
    if "data" in shown:
        shown["data"] = [_data(record) for record in shown["data"]] or "none: plain SVD of the weights"
    if "made_by" in shown:
        shown["made_by"] = console.Verbatim(shown["made_by"])
    console.facts(
        out,
        f"{result.kind.capitalize()} in {result.path}",
        [(NAMES.get(key, _words(key)), shown[key]) for key in shown],
    )
    if result.layers:
        out.print()
        layer_groups.draw(out, result.layers)
    if result.dense:
        console.heading(out, "\nStays dense" if result.kind == "base" else "\nDense")
        console.layer_table(out, [{"part": part["name"], **{key: part[key] for key in PART}} for part in result.dense])


def _data(record: dict[str, Any]) -> str:
    return f"{record['file']}: {record['samples']:,} samples, {record['tokens']:,} tokens"


def _words(key: str) -> str:
    return key.replace("_", " ")
