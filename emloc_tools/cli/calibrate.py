"""`emloc-tools calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from emloc_tools.cli import help, options

EXAMPLE = """Example:

\b
  emloc-tools calibrate --base meta-llama/Llama-3.1-8B --data train.jsonl \\
      --output calibration
"""


@help.command(epilog=EXAMPLE)
@options.base_options()
@options.data_options(samples=64)
@options.layer_options
@click.option(
    "--gradients",
    is_flag=True,
    help="Also record what the loss minds. Takes several times as long, and for a while disk space beside --output: "
    "about tokens x hidden size x (blocks + 5) x 2 bytes (4 in float32).",
)
@options.device_options("auto", "Precision of the forward pass.  [default: that of the base]")
@options.shard_option
@options.output_options
@options.report_options
def calibrate(
    base: str,
    revision: str | None,
    trust_remote_code: bool,
    data: Path,
    samples: int,
    max_length: int,
    batch_size: int,
    seed: int,
    targets: str | None,
    exclude: str | None,
    gradients: bool,
    device: str,
    dtype: str,
    max_shard_size: int,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Record how your data look in each layer of a base.

    These statistics (Gram matrices) let build-emulator keep what matters for the task. With --gradients the samples
    also run backward, which makes far better emulators. The base is read once (twice with --gradients), block by block,
    and may be larger than memory.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.calibrate import calibrate as run

    with console.progress(hidden=quiet) as progress:
        result = run(
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            data=data,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            targets=targets,
            exclude=exclude,
            gradients=gradients,
            device=device,
            dtype=dtype,
            max_shard_size=max_shard_size,
            output=output,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    rows: list[tuple[str, Any]] = [
        ("samples", result.samples),
        ("tokens", result.tokens),
        ("layers", result.layers),
        ("statistics", f"{result.grams + result.gradients} Gram matrices, {console.size(result.gram_bytes)}"),
        ("read", console.size(result.bytes_read)),
    ]
    following = ("build-emulator", "--base", base, "--calibration", output, "--ratio", "0.25", "--output", "EMULATOR")
    rows.append(("next", console.Verbatim(options.runnable(*following))))
    console.emit(
        result, as_json=as_json, quiet=quiet, draw=lambda out: console.facts(out, f"Calibration in {output}", rows)
    )
    if gradients and result.gradients < result.layers:
        console.warn(
            f"the loss depends on {result.gradients} of {result.layers} layers; the others are not weighted by it",
            hidden=quiet,
        )
    if result.unreached:
        console.warn(
            f"no sample reached {len(result.unreached)} layers, such as {result.unreached[0]}; an emulator keeps them "
            "dense, but single experts of others become plain SVDs. More --samples may reach them.",
            hidden=quiet,
        )
