"""`emloc-tools push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.push import Pushed

EXAMPLE = """Examples:

\b
  emloc-tools push corrected --repo org/my-lora --dry-run
  emloc-tools push emulator --repo org/my-emulator --public
"""


@help.command(epilog=EXAMPLE)
@click.argument("folder", type=options.FOLDER, metavar="FOLDER")
@click.option("--repo", metavar="ORG/NAME", required=True, help="Repository on the Hub, created if need be.")
@click.option("--revision", "repo_revision", metavar="BRANCH", help="Branch to write to, created if need be.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--public", is_flag=True, help="Everybody may see it. A new repository is private otherwise.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card, and send no request.")
@options.report_options
def push(
    folder: Path,
    repo: str,
    repo_revision: str | None,
    message: str | None,
    public: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Upload a calibration, emulator or adapter to the Hub.

    All of the folder is checked first, and only files that belong to the artifact are uploaded, in one commit, with a
    model card: the base and its license, how it was made, and what was measured. A README.md that you wrote is kept.
    Log in with `hf auth login`, or set HF_TOKEN; HF_ENDPOINT names another Hub.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.push import push as run

    with console.progress(hidden=quiet) as progress:
        result = run(
            folder,
            repo=repo,
            public=public,
            dry_run=dry_run,
            repo_revision=repo_revision,
            message=message,
            progress=progress,
        )
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result))
    for warning in result.warnings:
        console.warn(warning, hidden=quiet)


def _draw(out: Console, result: Pushed) -> None:
    from emloc_tools.cli import console

    total = sum(file.nbytes for file in result.files)
    rows: list[tuple[str, Any]] = [
        ("holds", result.kind),
        ("seen by", "everybody" if result.public else "those whom the repository's owner lets"),
        ("license", result.license or "none named"),
        ("card", "the README.md that a user wrote is kept" if result.card is None else "written"),
        ("size", f"{console.size(total)} in {len(result.files)} files"),
    ]
    if result.left_out:
        rows.append(("left out", result.left_out))
    if result.deleted:
        rows.append(("deleted there", result.deleted))
    if result.commit is not None:
        rows.append(("commit", console.Verbatim(result.commit)))
        rows.append(("next", console.Verbatim(options.runnable("pull", result.repo, "--output", result.kind.upper()))))
    done = "Dry run: nothing was sent, and this is what" if result.commit is None else "Pushed to"
    console.facts(out, f"{done} {result.repo}{' would hold' if result.commit is None else ''}", rows)
    out.print()
    console.layer_table(out, [{"file": file.name, "bytes": file.nbytes} for file in result.files])
    if result.commit is None and result.card is not None:
        console.heading(out, "\nREADME.md")
        for line in result.card.splitlines():
            console.line(out, f"  {line}".rstrip())
