"""The `emloc-tools` group: its commands, and the one place where expected errors become a message and exit status 1."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click

from emloc_tools import __version__
from emloc_tools.cli.build_emulator import build_emulator
from emloc_tools.cli.calibrate import calibrate
from emloc_tools.cli.correct import correct
from emloc_tools.cli.demo import demo
from emloc_tools.cli.evaluate import evaluate
from emloc_tools.cli.export import export
from emloc_tools.cli.fit_head import fit_head
from emloc_tools.cli.inspect import inspect
from emloc_tools.cli.merge import merge
from emloc_tools.cli.merge_calibration import merge_calibration
from emloc_tools.cli.plan import plan
from emloc_tools.cli.pull import pull
from emloc_tools.cli.push import push
from emloc_tools.cli.record_inputs import record_inputs
from emloc_tools.cli.refine import refine
from emloc_tools.cli.report import report
from emloc_tools.cli.trainer_config import trainer_config
from emloc_tools.cli.truncate import truncate
from emloc_tools.cli.verify import verify
from emloc_tools.errors import EmlocError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Terminated(BaseException):
    """SIGTERM, by which schedulers stop a job. By default Python would die at once and leave unfinished folders."""


class Group(click.Group):
    """Lists commands in the order of work, and turns expected errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands as they were added: the order in which they are used."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in their sections, aligned over all of them."""
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                rows = [(command.name or "", command.get_short_help_str(limit=formatter.width)) for command in commands]
                formatter.write_dl([(name.ljust(width), summary) for name, summary in rows])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Unexpected exceptions keep their traceback."""
        try:
            with _sigterm_raises():
                return super().invoke(ctx)
        except EmlocError as error:
            _fail(ctx, str(error), 1)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            _fail(ctx, f"{error.filename or 'writing'}: {error.strerror}; nothing was left under the final name", 1)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; nothing was left under the final name", 130)
        except Terminated:
            _fail(ctx, "terminated; nothing was left under the final name", 143)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _fail(ctx: click.Context, message: str, status: int) -> None:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    ctx.exit(status)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="emloc-tools")
def main() -> None:
    """Fine-tune a large model with LoRA in the memory of a small one (EMLoC).

    Train the LoRA on a light low-rank emulator of the model, with any trainer; then correct it for the model itself:

    \b
      emloc-tools calibrate       base + data             -> calibration
      emloc-tools build-emulator  base + calibration      -> emulator
      (any trainer)               emulator                -> LoRA
      emloc-tools correct         LoRA + emulator + base  -> LoRA for the base
      emloc-tools refine          LoRA + base + data      -> a better LoRA for it
      emloc-tools merge           LoRA + base             -> dense model

    `emloc-tools demo` runs all of it in a few minutes, without any download.
    """
    # PEFT imports it where it is installed, and it then warns of kernels for inference, which nothing here runs.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)


# In the order of work.
SECTIONS = {
    "The base and your data": (plan, fit_head, record_inputs, calibrate, merge_calibration),
    "The emulator": (build_emulator, truncate, export, trainer_config),
    "The LoRA": (correct, refine, verify, merge, evaluate),
    "Look and share": (inspect, report, push, pull, demo),
}
for section in SECTIONS.values():
    for command in section:
        main.add_command(command)
