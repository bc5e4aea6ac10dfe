"""`emloc-tools fit-head`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.fit_head import FittedHead
    from emloc_tools.stages.head_fitting import Quality

EXAMPLE = """Example:

\b
  emloc-tools fit-head --base meta-llama/Llama-3.1-8B --data labelled.jsonl \\
      --output headed
"""


@help.command("fit-head", epilog=EXAMPLE)
@options.base_options()
@options.data_options(samples=None)
@click.option(
    "--held-out",
    type=float,
    default=0.2,
    show_default=True,
    help="Part of the samples of every label that is not fitted but measured on, 0 to below 1.",
)
@click.option(
    "--weight-decay",
    type=float,
    help="Half of it, times the squared values of the head, is added to the mean loss.  [default: the best of 0.001 to "
    "1 in cross-validation]",
)
@click.option(
    "--fit-dtype",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="Precision of the fit.",
)
@options.device_options("auto", "Precision of the forward pass.  [default: that of the model]")
@options.output_options
@options.report_options
def fit_head(
    base: str,
    revision: str | None,
    trust_remote_code: bool,
    data: Path,
    samples: int | None,
    max_length: int,
    batch_size: int,
    seed: int,
    held_out: float,
    weight_decay: float | None,
    fit_dtype: str,
    device: str,
    dtype: str,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Give a base a head for labels, fitted on the base.

    --data is JSONL with text and label (a text or a whole number), and text_pair where there are two. The base runs
    block by block; the head, all that its class for sequence classification has and the checkpoint lacks, is fitted on
    what it would read. The output is a model folder and the base of every other command: make the emulator of it, and
    train the LoRA with the head frozen.

    The base's weights are not written again but linked, where the file system can.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.fit_head import fit_head as run

    with console.progress(hidden=quiet) as progress:
        fitted = run(
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            data=data,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            held_out=held_out,
            weight_decay=weight_decay,
            fit_dtype=fit_dtype,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
            output=output,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    console.emit(fitted, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, fitted, data))
    for message in _warnings(fitted):
        console.warn(message, hidden=quiet)


def _draw(out: Console, fitted: FittedHead, data: Path) -> None:
    from emloc_tools.cli import console

    calibrate = ("calibrate", "--base", fitted.output, "--data", data, "--gradients", "--output", "calibration")
    shards = fitted.shards
    rows: list[tuple[str, Any]] = [
        ("base", f"{fitted.base.id} ({fitted.base.architecture}), now {fitted.architecture}"),
        ("labels", f"{len(fitted.labels)}: {', '.join(fitted.labels)}"),
        ("head", f"{', '.join(fitted.head)} ({fitted.parameters:,} parameters)"),
        ("weight decay", f"{fitted.weight_decay:g}{', chosen by cross-validation' if fitted.tried else ''}"),
        ("fitted on", _quality(fitted.fitted)),
    ]
    if fitted.before is not None and fitted.after is not None:
        rows += [
            ("held out", _quality(fitted.after)),
            ("", f"a random head: {_quality(fitted.before)}; the most frequent label: {fitted.usual:.1%}"),
        ]
    rows += [
        ("files", f"{shards.linked} shared with the base, {shards.copied} copied, {shards.written} written"),
        ("padding", f"token {fitted.pad}"),
        ("next", console.Verbatim(options.runnable(*calibrate))),
    ]
    console.facts(out, f"Base with a head in {fitted.output}", rows)


def _quality(quality: Quality) -> str:
    return f"{quality.samples:,} samples: loss {quality.loss:.4f}, accuracy {quality.accuracy:.1%}"


def _warnings(fitted: FittedHead) -> list[str]:
    found = []
    if not fitted.minimum.converged:
        found.append(
            f"the fit ended after {fitted.minimum.evaluations:,} evaluations at a gradient of "
            f"{fitted.minimum.gradient:.1e}, which is no minimum yet; a larger --weight-decay has one that is nearer"
        )
    if fitted.after is not None and fitted.usual is not None and fitted.after.accuracy <= fitted.usual:
        found.append(
            f"on held-out samples the head is right in {fitted.after.accuracy:.1%}, and the most frequent label alone "
            f"in {fitted.usual:.1%}; give more samples, or another --weight-decay"
        )
    if not fitted.pads:
        found.append(
            f"the tokenizer pads with another token, or none; the model takes {fitted.pad} for padding, so let the "
            "trainer's tokenizer pad with that one"
        )
    return found
