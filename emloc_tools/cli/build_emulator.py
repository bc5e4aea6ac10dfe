"""`emloc-tools build-emulator`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from emloc_tools.records import Allocation, Weighting

EXAMPLE = """Example:

\b
  emloc-tools build-emulator --base meta-llama/Llama-3.1-8B \\
      --calibration calibration --ratio 0.25 --output emulator
"""


@help.command(name="build-emulator", epilog=EXAMPLE)
@options.base_options(required=False)
@click.option(
    "--from-plan",
    "from_plan",
    type=options.FILE,
    help="File from plan --save, which gives base, ratio, layers and precision. --base may name a copy of the base.",
)
@click.option("--calibration", type=options.FOLDER, help="Folder from calibrate.  [default: plain SVD of the weights]")
@options.size_options
@click.option(
    "--weighting",
    type=click.Choice(["none", "gradient"]),
    help="Measure errors in a layer's outputs, or by what the loss minds.  [default: gradient if calibrated so]",
)
@click.option(
    "--damping",
    type=float,
    help="For gradient: share of the mean squared gradient that every direction gets.  [default: 0.05]",
)
@click.option(
    "--allocation",
    type=click.Choice(["uniform", "adaptive"]),
    help="Same ratio for every layer, or more ranks where they gain more.  [default: adaptive with gradient]",
)
@click.option("--preset", type=click.Choice(["paper"]), help="paper: --weighting none --allocation uniform.")
@options.layer_options
@options.device_options("cpu", "Precision of the stored factors.  [default: that of the base]")
@click.option(
    "--eigen-dtype",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="Precision of the decompositions.",
)
@options.shard_option
@options.output_options
@options.report_options
def build_emulator(
    base: str | None,
    revision: str | None,
    trust_remote_code: bool,
    from_plan: Path | None,
    calibration: Path | None,
    ratio: float | None,
    params: int | None,
    size: int | None,
    weighting: Weighting | None,
    damping: float | None,
    allocation: Allocation | None,
    preset: str | None,
    targets: str | None,
    exclude: str | None,
    device: str,
    dtype: str,
    eigen_dtype: str,
    max_shard_size: int,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build a light stand-in for a base, to train a LoRA on.

    Every linear layer becomes low-rank factors that best keep its outputs on the calibration data. Weights are read
    one at a time. Exactly one of --ratio, --params, --size and --from-plan is needed.
    """
    from emloc_tools.cli import console, emulators
    from emloc_tools.stages.build_emulator import build_emulator as run

    if from_plan is not None:
        from emloc_tools.stages.plan import planned_build

        if any(value is not None for value in (ratio, params, size, targets, exclude)):
            raise click.UsageError(
                "--from-plan already says the ratio and the layers; give it without --ratio, --params, --size, "
                "--targets and --exclude."
            )
        planned = planned_build(from_plan)
        ratio, targets, exclude = planned.ratio, planned.targets, planned.exclude
        dtype = planned.dtype if dtype == "auto" else dtype
        if base is None:
            base, revision = planned.base, revision or planned.revision
    if base is None:
        raise click.UsageError("Missing option '--base'; only --from-plan can take its place.")
    if preset == "paper":
        if weighting or allocation or damping is not None:
            raise click.UsageError(
                "--preset paper already says --weighting none --allocation uniform; give it without --weighting, "
                "--damping and --allocation."
            )
        weighting, allocation = "none", "uniform"
    with console.progress(hidden=quiet) as progress:
        written = run(
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            calibration=calibration,
            ratio=ratio,
            params=params,
            size=size,
            weighting=weighting,
            damping=damping,
            allocation=allocation,
            targets=targets,
            exclude=exclude,
            device=device,
            dtype=dtype,
            eigen_dtype=eigen_dtype,
            max_shard_size=max_shard_size,
            output=output,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    console.emit(written, as_json=as_json, quiet=quiet, draw=lambda out: emulators.draw(out, written))
