"""The images of a record: where it names them, and reading them from their files.

A record names images as trainers and chat templates take them: in parts of a message's content, such as
`{"type": "image", "image": "a.png"}`, or in a list `images` beside the messages or the text, in the order in which
`{"type": "image"}` without a path leaves places for them.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_tools.errors import InputError
from emloc_tools.models.processors import require_pillow
from emloc_tools.models.source import first_line

if TYPE_CHECKING:
    from PIL.Image import Image

CONVERSATIONS = ("messages", "prompt", "completion")
MEDIA = ("image", "image_url", "video", "audio")  # types of parts that are not text
SOURCES = ("image", "path", "url", "image_url")  # keys under which a part names its image


def names_media(record: Mapping[str, Any]) -> bool:
    """Whether a record has images, or other media. What is wrong with them is found when they are taken."""
    listed = bool(record.get("images") or record.get("image"))
    return listed or any(isinstance(part, dict) and part.get("type") in MEDIA for part in _parts(record))


def as_parts(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the record with the content of every message as a list of parts.

    The templates of models that read images look for parts; some pass over a plain string without an error.
    """
    changed = copy.deepcopy(dict(record))
    for message in _messages(changed):
        if isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return changed


def take_images(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The record with bare `{"type": "image"}` parts, and the images' paths in the order of these.

    `images` fill the parts that name none; in a conversation without any image part they go before the first user
    message, as trainers put them. A record of plain texts names its images in `images` alone. Raises `ValueError` or
    `TypeError` for images that are not paths of files, for other media, and where places and images do not match.
    """
    record = as_parts(record)
    listed = _listed(record)
    if not any(isinstance(record.get(key), list) for key in CONVERSATIONS):
        return record, listed
    if listed and not any(map(_is_image, _parts(record))):
        _put_before_first_question(record, len(listed))
    parts = [part for part in _parts(record) if _is_image(_known(part))]
    named = [_named(part) for part in parts]
    if named.count(None) != len(listed):
        raise ValueError(
            f'`images` holds {len(listed)}, and {named.count(None)} parts {{"type": "image"}} leave a place for one'
        )
    for part in parts:
        part.clear()
        part["type"] = "image"
    left = iter(listed)
    return record, [next(left) if name is None else name for name in named]


def places_in(prompt: Any, images: int) -> int:
    """How many of a record's `images` belong to its prompt: those of its parts, or all of them if it is a string."""
    return sum(map(_is_image, _parts({"prompt": prompt}))) if isinstance(prompt, list) else images


def open_image(folder: Path, name: str) -> Image:
    """Read an image as RGB, upright; a relative `name` is below `folder`.

    Raises `InputError` naming the file where it is missing or broken.
    """
    require_pillow()
    from PIL import Image, ImageOps

    path = folder / name
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"the image {path} does not exist; paths are relative to the data file") from error
    # Pillow reports a damaged file by any of these.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"the image {path} cannot be read: {first_line(error)}") from error


def _messages(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages of all conversations in a record."""
    for key in CONVERSATIONS:
        messages = record.get(key)
        yield from (m for m in messages if isinstance(m, dict)) if isinstance(messages, list) else ()


def _parts(record: Mapping[str, Any]) -> Iterator[Any]:
    """The parts of all messages that have some."""
    for message in _messages(record):
        content = message.get("content")
        yield from content if isinstance(content, list) else ()


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _known(part: Any) -> Any:
    """The part itself, if it is a text or an image. Raises ValueError for others, which would be left out silently."""
    if _is_image(part):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part
    shown = f"of type {kind!r}" if isinstance(kind, str) and kind != "text" else reprlib.repr(part)
    raise ValueError(
        f'a part {shown} found, expected {{"type": "text", "text": TEXT}} or {{"type": "image", "image": PATH}}; a '
        ".safetensors file as --data can give any other inputs"
    )


def _listed(record: dict[str, Any]) -> list[str]:
    """What `images`, or `image` for a single one, list. Both leave the record."""
    listed, single = record.pop("images", None) or [], record.pop("image", None)
    if not isinstance(listed, list):
        raise TypeError(f"`images` is {type(listed).__name__}, expected a list of paths")
    return [_path(name) for name in [*listed, *([] if single is None else [single])]]


def _put_before_first_question(record: Mapping[str, Any], count: int) -> None:
    for message in _messages(record):
        if message.get("role") == "user" and isinstance(message.get("content"), list):
            message["content"] = [*({"type": "image"} for _ in range(count)), *message["content"]]
            return


def _named(part: Mapping[str, Any]) -> str | None:
    """The path that an image part names, if it names one."""
    for key in SOURCES:
        source = part.get(key)
        if key == "image_url" and isinstance(source, dict):
            source = source.get("url")
        if source is not None:
            return _path(source)
    return None


def _path(source: object) -> str:
    if not isinstance(source, str) or not source:
        raise TypeError(f"an image is given as {type(source).__name__}, expected the path of its file")
    if "://" in source or source.startswith("data:"):
        shown = source if len(source) <= 60 else f"{source[:60]}…"
        raise ValueError(f"the image {shown} is not a file; fetch it before and give its path")
    return source
