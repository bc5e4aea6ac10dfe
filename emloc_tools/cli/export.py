"""`emloc-tools export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.export import ExportedModel

EXAMPLE = """Example:

\b
  emloc-tools export --emulator emulator --to dense --output dense
"""


@help.command(epilog=EXAMPLE)
@click.option("--emulator", type=options.FOLDER, required=True, help="Folder from build-emulator.")
@click.option("--to", type=click.Choice(["dense"]), required=True, help="dense: a plain model of the base's class.")
@options.device_option("cpu")
@options.shard_option
@options.output_options
@options.report_options
def export(
    emulator: Path,
    to: Literal["dense"],
    device: str,
    max_shard_size: int,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write an emulator as a plain dense model.

    Its layers' factors are multiplied out, one tensor at a time. The result is as large as the base and computes what
    the emulator computes, so it saves no memory: it is for trainers that read a layer's weight themselves or do not
    load code from a model's folder. Correct a LoRA trained on it with the emulator that it was made from.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.export import export as run

    with console.progress(hidden=quiet) as progress:
        exported = run(
            emulator=emulator,
            to=to,
            device=device,
            max_shard_size=max_shard_size,
            output=output,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    console.emit(exported, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, emulator, exported))


def _draw(out: Console, emulator: Path, exported: ExportedModel) -> None:
    from emloc_tools.cli import console

    correct = ("correct", "--emulator", emulator, "--adapter", "LORA", "--base", exported.base.id)
    rows: list[tuple[str, Any]] = [
        ("base", f"{exported.base.id} ({exported.base.architecture})"),
        ("multiplied", f"{len(exported.multiplied)} weights"),
        ("copied", f"{exported.copied} tensors"),
        ("size", console.size(exported.nbytes)),
        ("next", "train a LoRA on it; then"),
        ("", console.Verbatim(options.runnable(*correct, "--output", "corrected"))),
    ]
    console.facts(out, f"Dense emulator in {exported.folder}", rows)
