"""`emloc-tools trainer-config`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emloc_tools.cli import help, options

if TYPE_CHECKING:
    from rich.console import Console

    from emloc_tools.stages.trainer_config import Trainer, TrainerConfig

TRAINERS = ("trl", "transformers", "accelerate", "axolotl", "llamafactory", "ms-swift", "unsloth")
EXAMPLE = """Examples:

\b
  emloc-tools trainer-config --trainer trl --emulator emulator \\
      --data data/train.jsonl --output sft.yaml
  emloc-tools trainer-config --trainer accelerate --emulator emulator \\
      --data data/train.jsonl --steps 200 --output train.py
"""
POSITIVE = click.IntRange(min=1)


@help.command("trainer-config", epilog=EXAMPLE)
@click.option("--trainer", type=click.Choice(TRAINERS), required=True, help="Whose configuration to write.")
@click.option("--emulator", type=options.FOLDER, required=True, help="Folder from build-emulator.")
@click.option("--data", type=options.FILE, required=True, help="JSONL with text, messages, or prompt and completion.")
@click.option("--lora", type=options.FOLDER, default=Path("lora"), help="Where the LoRA is to go.  [default: lora]")
@click.option("--rank", type=POSITIVE, help="Rank of the LoRA.  [default: 16, less if the emulator's are]")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=2e-4,
    show_default=True,
    help="Falls along half a cosine.",
)
@click.option("--batch-size", type=POSITIVE, default=1, show_default=True, help="Samples per device and step.")
@click.option("--accumulation", type=POSITIVE, default=8, show_default=True, help="Batches per gradient step.")
@click.option("--epochs", type=POSITIVE, default=1, show_default=True, help="How often to go through the data.")
@click.option("--steps", type=POSITIVE, help="Gradient steps, instead of --epochs.")
@click.option("--max-length", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per sample.")
@click.option("--four-bits", is_flag=True, help="Hold the emulator in 4 bits while training, by bitsandbytes.")
@click.option("--output", type=options.FILE, required=True, help="File to write.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@options.report_options
def trainer_config(
    trainer: Trainer,
    emulator: Path,
    data: Path,
    lora: Path,
    rank: int | None,
    learning_rate: float,
    batch_size: int,
    accumulation: int,
    epochs: int,
    steps: int | None,
    max_length: int,
    four_bits: bool,
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a trainer's configuration for an emulator.

    A YAML file for TRL, axolotl, LLaMA-Factory (with its dataset_info.json beside it) and ms-swift, a program for
    transformers, accelerate and Unsloth. It is ready to run where the trainer is installed, and has what an emulator
    needs: code from its folder, its dtype, and a plain LoRA on the layers that are factors. Paths in it are those given
    here.
    """
    from emloc_tools.cli import console
    from emloc_tools.stages.trainer_config import trainer_config as run

    written = run(
        trainer=trainer,
        emulator=emulator,
        data=data,
        output=output,
        lora=lora,
        rank=rank,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        steps=steps,
        max_length=max_length,
        four_bits=four_bits,
        overwrite=overwrite,
    )
    console.emit(written, as_json=as_json, quiet=quiet, draw=lambda out: _draw(out, written))


def _draw(out: Console, written: TrainerConfig) -> None:
    from emloc_tools.cli import console

    settings = written.settings
    rows: list[tuple[str, Any]] = [
        ("files", [console.Verbatim(path) for path in written.files]),
        ("LoRA", f"rank {settings.rank}, alpha {settings.alpha}, on {', '.join(settings.targets)}"),
        ("dtype", settings.dtype + (", held in 4 bits" if settings.four_bits else "")),
        ("run", console.Verbatim(written.run)),
        ("then", console.Verbatim(settings.next_command)),
    ]
    console.facts(out, f"Configuration for {written.trainer}", rows)
