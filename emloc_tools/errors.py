"""Every error that a user can cause. Each message says what was found, where, what was expected and what to do."""

from __future__ import annotations

import re

LONGEST_PART = 300  # characters of a field or a message, which may come from a file nobody vouches for


class EmlocError(Exception):
    """Base of all expected errors: the command line shows its message on one line and exits with status 1."""


class InputError(EmlocError):
    """A path, an option or a data file that cannot be used as given."""


class FormatError(EmlocError):
    """A file breaks a numbered rule of its format (`formats/*/SPEC.md`).

    `rule` is the rule's number (for example `C4`), `file` the offending file and `field` the place in it:
    a manifest field or a tensor name. The message is one printable line, whatever the file holds.
    """

    def __init__(self, rule: str, file: object, field: str, message: str) -> None:
        self.rule, self.file, self.field = rule, str(file), field
        where = f"{_one_line(self.file)}: {_one_line(_short(field))}" if field else _one_line(self.file)
        # Files that belong to no format of ours, such as a base's weights, have no numbered rule.
        numbered = f" (format rule {rule})" if re.fullmatch(r"[A-Z]\d+", rule) else ""
        super().__init__(f"{where}: {_one_line(_short(message))}{numbered}")


class MismatchError(EmlocError):
    """Two artifacts that do not belong together, such as an adapter and a base it was not trained for."""


class UnsupportedError(EmlocError):
    """Something valid that emloc-tools cannot treat correctly, and therefore refuses."""


class NumericalError(EmlocError):
    """NaN or infinity, or a decomposition that did not converge."""


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_PART else f"{text[:LONGEST_PART]}…"


def _one_line(text: str) -> str:
    """Names in a damaged file may hold line breaks, terminal escapes or halves of surrogate pairs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
