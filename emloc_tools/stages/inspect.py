"""inspect: what one of our folders holds, and where it comes from."""

from __future__ import annotations

import re
from pathlib import Path

from emloc_tools.errors import InputError
from emloc_tools.reporting.folders import BASES, READERS, is_base, marker_of
from emloc_tools.reporting.inspection import Inspection
from emloc_tools.reporting.model_parts import parts_of_base

__all__ = ["Inspection", "inspect"]

HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")


def inspect(
    path: Path,
    *,
    revision: str | None = None,
    targets: str | None = None,
    exclude: str | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Describe a calibration, an emulator, an adapter or a merged model; structure is checked as on every use.

    Of a base, a folder or a Hub id (`org/name`), it says which layers `targets` and `exclude` choose to become factors,
    and what stays dense for which reason; only there the options mean something. No weights are read or fetched.

    Values are read of an adapter only, for its hash, and to see that those of a corrected one are as `correct` wrote
    them.

    Raises `InputError` for anything else, `FormatError` for a folder that breaks its format.
    """
    options = {"--revision": revision, "--targets": targets, "--exclude": exclude}
    marker = marker_of(path)
    if marker is not None:
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise InputError(f"{path} holds {marker}; {given[0]} says something of a base only, leave it out")
        return READERS[marker](path)
    if is_base(path) or (not path.exists() and HUB_ID.fullmatch(str(path))):
        facts, layers, dense = parts_of_base(
            str(path), revision=revision, targets=targets, exclude=exclude, trust_remote_code=trust_remote_code
        )
        return Inspection("base", path, facts, layers, dense)
    found = "is a file" if path.is_file() else f"holds none of {', '.join([*READERS, *BASES])}"
    if not path.exists():
        found = "does not exist"
    raise InputError(f"{path} {found}; inspect takes a base, a folder that emloc-tools wrote, or an adapter")
