"""`emloc-tools pull`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.pull import Pulled

EXAMPLE = """Example:

\b
  emloc-tools pull org/my-emulator --output emulator
"""


@help.command(epilog=EXAMPLE)
@click.argument("repo", metavar="ORG/NAME")
@click.option("--revision", "repo_revision", metavar="REV", help="Branch, tag or commit of the repository.")
@options.output_options
@options.report_options
def pull(repo: str, repo_revision: str | None, output: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Download a calibration, emulator or adapter from the Hub.

    Fetches only the files that belong to the artifact, and checks every value. The folder appears once it is complete.
    For a private repository log in with `hf auth login`, or set HF_TOKEN; HF_ENDPOINT names another Hub.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.pull import pull as run

    with console.progress(hidden=quiet) as progress:
        result = run(repo, output=output, repo_revision=repo_revision, overwrite=overwrite, progress=progress)
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result))


def _draw(out: Console, result: Pulled) -> None:
    from emloc_tools.cli import console

    rows: list[tuple[str, Any]] = [
        ("from", f"{result.repo}, commit {result.revision}"),
        ("size", f"{console.size(result.nbytes)} in {len(result.files)} files"),
        ("checked", "every value"),
        ("next", console.Verbatim(options.runnable("inspect", result.output))),
    ]
    if result.left_out:
        rows.insert(2, ("left there", result.left_out))
    console.facts(out, f"{result.kind.capitalize()} in {result.output}", rows)
