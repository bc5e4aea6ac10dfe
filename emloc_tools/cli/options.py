"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

PROGRAM = "emloc-tools"

if TYPE_CHECKING:
    _Type = click.ParamType[int]
else:
    _Type = click.ParamType  # generic only from click 8.4

Command = TypeVar("Command", bound=Callable[..., Any])


def _path(name: str) -> click.Path:
    """A path, shown as `name` in help texts. The stages check it, for they can say what they expect there."""
    path = click.Path(path_type=Path)
    path.name = name
    return path


FOLDER, FILE = _path("folder"), _path("file")


class Quantity(_Type):
    """A whole number with an optional unit, such as `2B` parameters or `8GiB`. `units` maps each to its factor."""

    def __init__(self, name: str, units: Mapping[str, int], *, example: str) -> None:
        self.name, self._units, self._example = name, units, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of units 1."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", value.strip())
        unit = {name.lower(): factor for name, factor in self._units.items()}.get(match[2].lower()) if match else None
        if match is None or unit is None:
            units = ", ".join(name for name in self._units if name)
            self.fail(f"{value!r} is not a number with one of the units {units}, such as {self._example}", param, ctx)
        count = int(Decimal(match[1]) * unit)
        if count < 1:
            self.fail(f"{value!r} is less than 1", param, ctx)
        return count


PARAMETERS = Quantity("COUNT", {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}, example="2B")
DECIMAL_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BYTES = Quantity("SIZE", {"": 1, **DECIMAL_BYTES, **BINARY_BYTES}, example="8GiB")


def base_options(required: bool = True) -> Callable[[Command], Command]:
    """--base, --revision and --trust-remote-code."""
    return _stack(
        click.option("--base", metavar="BASE", required=required, help="Base model: a folder, or a Hub id (org/name)."),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id."),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run Python code from the base's folder. Off by default."
        ),
    )


def data_option(command: Command) -> Command:
    """--data."""
    return click.option(
        "--data",
        type=FILE,
        required=True,
        help="JSONL with text, messages (whose parts may name images), or prompt and completion, for a classifier "
        "with text and label; or .safetensors with ready model inputs.",
    )(command)


def reading_options(command: Command) -> Command:
    """How samples become batches, and which ones are taken."""
    return _stack(
        click.option(
            "--max-length", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per sample."
        ),
        click.option(
            "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Samples per batch."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Chooses the samples."),
    )(command)


def data_options(samples: int | None) -> Callable[[Command], Command]:
    """--data and how it is read."""
    shown = "all" if samples is None else str(samples)
    return _stack(
        data_option,
        click.option(
            "--samples", type=click.IntRange(min=1), default=samples, help=f"How many to use.  [default: {shown}]"
        ),
        reading_options,
    )


def layer_options(command: Command) -> Command:
    """--targets and --exclude."""
    return _stack(
        click.option("--targets", metavar="REGEX", help="Linear layers to treat.  [default: all in repeated blocks]"),
        click.option("--exclude", metavar="REGEX", help="Linear layers to leave as they are."),
    )(command)


def size_options(command: Command) -> Command:
    """--ratio, --params and --size, of which exactly one is given."""
    return _stack(
        click.option("--ratio", type=float, help="Part of each layer's values to keep, 0 to 1, such as 0.25."),
        click.option("--params", type=PARAMETERS, help="Parameters of the whole emulator, such as 2B."),
        click.option("--size", type=BYTES, help="Bytes of the whole emulator, such as 8GiB or 8GB."),
    )(command)


def device_option(device: str) -> Callable[[Command], Command]:
    """--device."""
    return click.option(
        "--device",
        metavar="DEVICE",
        default=device,
        show_default=True,
        help="Where to compute: auto, cpu, cuda, cuda:1, ...",
    )


def device_options(device: str, dtype_help: str) -> Callable[[Command], Command]:
    """--device and --dtype."""
    dtypes = click.Choice(["auto", "float32", "bfloat16", "float16"])
    return _stack(
        device_option(device),
        click.option("--dtype", type=dtypes, default="auto", help=dtype_help),
    )


def output_options(command: Command) -> Command:
    """--output and --overwrite."""
    return _stack(
        click.option("--output", type=FOLDER, required=True, help="Folder to write."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output of emloc-tools."),
    )(command)


def shard_option(command: Command) -> Command:
    """--max-shard-size."""
    return click.option(
        "--max-shard-size", type=BYTES, default="5GB", show_default=True, help="Largest size of one tensor file."
    )(command)


def report_options(command: Command) -> Command:
    """--json and --quiet."""
    return _stack(
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout."),
        click.option("--quiet", is_flag=True, help="Print errors only."),
    )(command)


def command_line() -> str:
    """The command line, for the provenance of an artifact."""
    return shlex.join([PROGRAM, *sys.argv[1:]])


def runnable(*words: object) -> str:
    """A command of ours that can be pasted into a shell."""
    return shlex.join([PROGRAM, *map(str, words)])


def _stack(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
