"""Help texts with options in groups: the same option is in the same group of every command."""

from __future__ import annotations

import functools
import re

import click

OWN = "Options"  # those that only few commands have
LAST = "Output"
COLUMN = 26  # characters of an option; the text of a longer one begins on the next line
GROUPS: dict[str, tuple[str, ...]] = {
    "Base": ("base", "revision", "trust_remote_code"),
    "Inputs": ("emulator", "calibration", "adapter", "adapters", "from_plan"),
    "Samples": ("data", "held_out", "samples", "max_length", "seed"),
    "Size of the emulator": ("ratio", "params", "size"),
    OWN: (),
    "Layers": ("targets", "exclude"),
    "Computation": ("batch_size", "device", "dtype", "eigen_dtype", "fit_dtype", "offload"),
    LAST: ("output", "save", "format", "max_shard_size", "overwrite", "dry_run", "as_json", "quiet"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


class GroupedCommand(click.Command):
    """A command whose help has its options in groups, each in the order in which the command names them."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """The same in every context, also those without the group's settings: click keeps what it finds first."""
        return ["-h", "--help"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups that have any option, with aligned texts."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):  # the line of usage names it
                continue
            record = parameter.get_help_record(ctx)
            if record is not None:
                record = _plainly(*record)
                is_help = parameter is self.get_help_option(ctx)
                rows[LAST if is_help else GROUP_OF.get(parameter.name or "", OWN)].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    # Padded, for each group would else have a column of its own width.
                    formatter.write_dl([(term.ljust(COLUMN), text) for term, text in records], col_max=COLUMN)


def _plainly(term: str, text: str) -> tuple[str, str]:
    """An option and its text without click's words for types and bounds."""
    for kind, letter in (("INTEGER", "N"), ("FLOAT", "X")):
        term = re.sub(rf"\b{kind}( RANGE)?\b", letter, term)
    return term, re.sub(r"\bx>=(\d+)", r"at least \1", text)


command = functools.partial(click.command, cls=GroupedCommand)
