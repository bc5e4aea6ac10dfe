"""Write `docs/cli.md`, the command reference, from the commands themselves.

    python -m docs.generate

A test fails while the file differs from what this writes.
"""

from __future__ import annotations

from pathlib import Path

import click

from emloc_tools.cli import main as group

REFERENCE = Path(__file__).with_name("cli.md")
WIDTH = 100
INTRODUCTION = """# Command reference

Written by `make docs` from the commands themselves. `emloc-tools COMMAND --help` shows the same.

- A base (`--base`) is a local model folder or a Hub id (`org/name`, with `--revision` if need be). Weights are read
  only from safetensors. `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are honoured.
- An output is always a folder. It appears under its name only when it is complete. An existing one is refused unless
  `--overwrite` is given, which replaces what emloc-tools wrote and nothing else.
- Results go to stdout, progress and errors to stderr. `--json` prints one JSON object, `--quiet` nothing.
- Exit status: 0 done, 1 an error with one line that says what to do, 2 wrong usage, 130 interrupted.
- Sizes take units of base 10 (`GB`) and base 2 (`GiB`); counts of parameters take `K`, `M`, `B` and `T`.
"""


def reference() -> str:
    """The text of the command reference."""
    sections = [section(name, command) for name, command in group.commands.items()]
    return "\n".join([INTRODUCTION, *sections])


def section(name: str, command: click.Command) -> str:
    """One command as `--help` shows it."""
    context = click.Context(command, info_name=f"emloc-tools {name}", terminal_width=WIDTH)
    return f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
