"""The license of a base, from the header of its model card. What is unclear counts as unknown; nothing is guessed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from emloc_tools.errors import EmlocError
from emloc_tools.files.json_files import read_bytes
from emloc_tools.files.manifest import BaseRecord
from emloc_tools.hub import client
from emloc_tools.hub.privacy import is_on_hub

CARD = "README.md"
LARGEST_CARD = 2_000_000  # bytes
HEADER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.MULTILINE | re.DOTALL)
VALUE = r"""^{key}:[ \t]+(["']?)([^\s"'#][^"'#\r\n]*?)\1[ \t]*(?:#.*)?$"""
NAME = re.compile(r"[A-Za-z0-9][\w.+\-]{0,99}", re.ASCII)
LINK = re.compile(r"https://[^\s<>\"'()\[\]`]{1,300}|LICENSE[\w.\-]{0,40}", re.ASCII)


@dataclass(frozen=True)
class License:
    """A license by its identifier on the Hub; `other` has a name, and a link or the name of a file."""

    id: str
    name: str | None = None
    link: str | None = None


def license_of(base: BaseRecord) -> License | None:
    """The license that a base's card names; None where there is no card or none that can be read, or it names none.

    The card is README.md in the base's local folder, or of the commit on the Hub that the base came from.
    """
    try:
        if is_on_hub(base):
            repository = "/".join(base.id.split("/")[:2])
            text = client.read_text(repository, CARD, base.revision, limit=LARGEST_CARD)
            found = license_in(text) if text is not None else None
            if found is not None and found.link is not None and "://" not in found.link:
                link = f"https://huggingface.co/{repository}/blob/main/{found.link}"
                found = License(found.id, found.name, link)
            return found
        path = Path(os.path.expanduser(base.id)) / CARD  # noqa: PTH111 - Path.expanduser raises without such a home
        return license_in(read_bytes(path, "card", LARGEST_CARD).decode("utf-8", "replace"))
    except EmlocError:
        return None


def license_in(text: str) -> License | None:
    """The license that the YAML header of a model card names with a plain word."""
    header = HEADER.match(text)
    found = _value(header[1], "license", NAME) if header else None
    if header is None or found is None:
        return None
    return License(found, _value(header[1], "license_name", NAME), _value(header[1], "license_link", LINK))


def _value(header: str, key: str, allowed: re.Pattern[str]) -> str | None:
    """A value of one line, if it is of the allowed form."""
    match = re.search(VALUE.format(key=key), header, re.MULTILINE)
    return match[2] if match and allowed.fullmatch(match[2]) else None
