"""`emloc-tools record-inputs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from emloc_tools.stages.record_inputs import Offload

EXAMPLE = """Example:

\b
  emloc-tools record-inputs --base black-forest-labs/FLUX.1-dev \\
      --prompts prompts.txt --steps 28 --set height=512 --output inputs
"""


def _assignments(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any] | None:
    """`NAME=VALUE` as arguments, if there are any: VALUE is JSON, or else a text."""
    arguments = {}
    for value in values:
        name, sign, text = value.partition("=")
        if not sign or not name.isidentifier():
            raise click.BadParameter(f"{value!r} is not of the form NAME=VALUE, such as height=512", ctx, param)
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments or None


@help.command(name="record-inputs", epilog=EXAMPLE)
@options.base_options()
@click.option("--prompts", type=options.FILE, required=True, help="Text with a prompt per line, or JSONL with prompt.")
@click.option("--keep", type=click.IntRange(min=1), default=4, show_default=True, help="Timesteps to keep per prompt.")
@click.option("--steps", type=click.IntRange(min=1), help="Timesteps of a run.  [default: that of the pipeline]")
@click.option(
    "--set",
    "arguments",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_assignments,
    help="Another argument of the pipeline, such as height=512. Can be given several times.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses noise and timesteps.")
@options.device_options("auto", "Precision of the pipeline.  [default: that of the stored weights]")
@click.option(
    "--offload",
    type=click.Choice(["none", "model", "sequential"]),
    default="none",
    show_default=True,
    help="Keep what does not run on the CPU: whole models, or single layers.",
)
@options.output_options
@options.report_options
def record_inputs(
    base: str,
    revision: str | None,
    trust_remote_code: bool,
    prompts: Path,
    keep: int,
    steps: int | None,
    arguments: dict[str, Any] | None,
    seed: int,
    device: str,
    dtype: str,
    offload: Offload,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Record what a pipeline's denoiser is given.

    Runs a pipeline of diffusers on your prompts and keeps the inputs of its transformer or unet at timesteps spread
    evenly: the data for calibrate. This needs the whole pipeline in memory, and the extra diffusers.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.record_inputs import record_inputs as run

    with console.progress(hidden=quiet) as progress:
        result = run(
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            prompts=prompts,
            keep=keep,
            steps=steps,
            arguments=arguments,
            seed=seed,
            device=device,
            dtype=dtype,
            offload=offload,
            output=output,
            overwrite=overwrite,
            progress=progress,
        )
    following = (
        "calibrate",
        "--base",
        base,
        "--data",
        result.file,
        "--samples",
        result.calls,
        "--output",
        "CALIBRATION",
    )
    rows: list[tuple[str, Any]] = [
        ("prompts", result.prompts),
        ("calls", f"{result.calls} of {result.component} ({result.architecture}), {console.size(result.nbytes)}"),
        ("next", console.Verbatim(options.runnable(*following))),
    ]
    console.emit(
        result,
        as_json=as_json,
        quiet=quiet,
        draw=lambda out: console.facts(out, f"Model inputs in {result.file}", rows),
    )
