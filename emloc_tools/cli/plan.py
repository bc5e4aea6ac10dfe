"""`emloc-tools plan`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.files.plan import Parts, PlanV1

EXAMPLE = """Example:

\b
  emloc-tools plan --base meta-llama/Llama-3.1-8B --memory 16GiB \\
      --sequence-length 2048 --save plan.json
"""


class Pixels(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A size in pixels, `448` or `HEIGHTxWIDTH`."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Height and width."""
        if isinstance(value, tuple):
            return value[0], value[1]
        match = re.fullmatch(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?", value)
        if match is None:
            self.fail(f"{value!r} is no size in pixels, such as 448 or 1024x768", param, ctx)
        return int(match[1]), int(match[2] or match[1])


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """Names with commas between them."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


_positive = click.IntRange(min=1)


@help.command(epilog=EXAMPLE)
@options.base_options()
@click.option("--memory", type=options.BYTES, required=True, help="Memory of the device to train on, such as 24GiB.")
@click.option("--reserve", type=options.BYTES, help="Part of it to leave for CUDA's own needs.  [default: 5%]")
@click.option("--batch-size", type=_positive, default=1, show_default=True, help="Samples per step.")
@click.option("--sequence-length", type=_positive, default=2048, show_default=True, help="Tokens per sample.")
@click.option("--images", type=click.IntRange(min=0), default=0, show_default=True, help="Images per sample.")
@click.option("--image-size", type=Pixels(), default="448", show_default=True, help="Pixels of an image.")
@click.option("--resolution", type=Pixels(), default="1024", show_default=True, help="Pixels, for diffusion models.")
@click.option(
    "--data", type=options.FILE, help="Samples as for calibrate: plan for the largest batch of these instead."
)
@click.option("--lora-rank", type=_positive, default=16, show_default=True, help="Rank of the LoRA.")
@click.option(
    "--lora-targets",
    metavar="NAMES",
    callback=_names,
    help="Layers that get a LoRA, such as q_proj,v_proj.  [default: all that become factors]",
)
@click.option(
    "--lora-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Precision of the LoRA; float32 is PEFT's choice.",
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing", default=True, show_default=True, help="Recompute."
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adafactor", "sgd"]),
    default="adamw",
    show_default=True,
    help="Of the LoRA.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Precision of the frozen weights.  [default: that of the base]",
)
@options.layer_options
@click.option("--save", type=options.FILE, help="File to write the plan to, for build-emulator --from-plan.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@options.report_options
def plan(
    base: str,
    revision: str | None,
    trust_remote_code: bool,
    memory: int,
    reserve: int | None,
    batch_size: int,
    sequence_length: int,
    images: int,
    image_size: tuple[int, int],
    resolution: tuple[int, int],
    data: Path | None,
    lora_rank: int,
    lora_targets: list[str] | None,
    lora_dtype: str,
    gradient_checkpointing: bool,
    optimizer: str,
    dtype: str,
    targets: str | None,
    exclude: str | None,
    save: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find the largest emulator that a memory can train.

    A training step is run in thought, on tensors without memory: of the base, and of emulators of several sizes. No
    weight is read, and of a Hub id none is fetched. Shows what the memory goes to, and what every stage needs.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.plan import plan as run

    with console.progress(hidden=quiet) as progress:
        result = run(
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            memory=memory,
            reserve=reserve,
            batch_size=batch_size,
            sequence_length=sequence_length,
            images=images,
            image_size=image_size,
            resolution=resolution,
            data=data,
            lora_rank=lora_rank,
            lora_targets=lora_targets,
            lora_dtype=lora_dtype,
            gradient_checkpointing=gradient_checkpointing,
            optimizer=optimizer,
            dtype=dtype,
            targets=targets,
            exclude=exclude,
            save=save,
            overwrite=overwrite,
            command=options.command_line(),
            progress=progress,
        )
    console.emit(result, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, result, save, dtype))


def _draw(out: Console, result: PlanV1, save: Path | None, dtype: str) -> None:
    from emloc_tools.cli import console

    usable = result.memory - result.reserve
    rows: list[tuple[str, Any]] = [
        ("architecture", result.base.architecture),
        ("memory", f"{console.size(result.memory)}, of which {console.size(usable)} to use"),
        ("step", _step(result)),
    ]
    if result.emulator is None:
        rows.append(("emulator", "none is needed: the base itself can be trained in this memory"))
    else:
        share = result.emulator.parameters / result.base_model.parameters
        rows += [
            ("emulator", f"ratio {result.ratio:g}: {result.factored_layers} factored layers"),
            ("parameters", f"{result.emulator.parameters:,} of {result.base_model.parameters:,} ({share:.0%})"),
            ("next", console.Verbatim(_build(result, save, dtype))),
        ]
    console.facts(out, f"Plan for {result.base.id}", rows)
    out.print()
    console.heading(out, "Peak memory of the device")
    of_emulator = [("emulator, training", result.emulator.training)] if result.emulator else []
    peaks = [*of_emulator, ("base, training", result.base_model.training), ("base, inference", result.inference)]
    console.layer_table(out, [_row(name, parts) for name, parts in peaks], to_right=PARTS)
    out.print()
    console.heading(out, "About what the stages need of this machine")
    table = [
        {
            "stage": each.stage,
            "memory": console.size(each.memory),
            "disk": console.size(each.disk),
            "for a while": console.size(each.scratch) if each.scratch else "",
        }
        for each in result.stages
    ]
    console.layer_table(out, table, to_right=("memory", "disk", "for a while"))


PARTS = ("total", "weights", "LoRA and optimizer", "activations", "logits")


def _row(name: str, parts: Parts) -> dict[str, str]:
    from emloc_tools.cli import console

    values = (parts.total, parts.weights, parts.training_state, parts.activations, parts.logits)
    return {"": name, **{part: console.size(value) for part, value in zip(PARTS, values, strict=True)}}


def _step(result: PlanV1) -> str:
    """The conditions in words."""
    given = result.conditions
    what = f"{given.batch_size} x {given.sequence_length:,} tokens"
    if given.data is not None:
        what = f"the largest batch of {given.batch_size} from {given.data}"
    elif given.images:
        what += f" with {given.images} images each"
    checkpointing = "with" if given.gradient_checkpointing else "without"
    return (
        f"{what}, {given.dtype}, LoRA of rank {given.lora_rank} in {given.lora_dtype}, {given.optimizer}, "
        f"{checkpointing} gradient checkpointing"
    )


def _build(result: PlanV1, save: Path | None, dtype: str) -> str:
    """The build-emulator line; the calibration is still to be made."""
    if save is not None:
        words: list[object] = ["--from-plan", save]
    else:
        words = ["--base", result.base.id, "--ratio", f"{result.ratio:g}"]
        words += ["--revision", result.base.revision] if result.base.revision else []
        words += ["--targets", result.targets] if result.targets is not None else []
        words += ["--exclude", result.exclude] if result.exclude is not None else []
        words += ["--dtype", dtype] if dtype != "auto" else []
    return options.runnable("build-emulator", *words, "--calibration", "CALIBRATION", "--output", "EMULATOR")
