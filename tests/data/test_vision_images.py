"""Records name images in every form that trainers take, each is found in its place, and every fault is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emloc_tools.data.images import names_media, open_image, places_in, take_images
from emloc_tools.errors import InputError

PLACE = {"type": "image"}
HELLO = {"type": "text", "text": "hello"}


def user(*content: Any) -> dict[str, Any]:
    """A message of a user."""
    return {"role": "user", "content": list(content)}


def parts(record: dict[str, Any]) -> list[Any]:
    """The parts of all messages."""
    return [part for message in record["messages"] for part in message["content"]]


@pytest.mark.parametrize(
    "named",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_a_part_names_its_image_under_any_of_the_usual_keys(named: dict[str, Any]) -> None:
    record = {"messages": [user(HELLO, named)]}
    assert names_media(record)
    taken, images = take_images(record)
    assert images == ["a.png"]
    assert parts(taken) == [HELLO, PLACE]
    assert parts(record) == [HELLO, named], "the record itself stays as it is"


def test_listed_images_fill_the_parts_that_name_none_in_order() -> None:
    own = {"type": "image", "image": "own.png"}
    record = {"messages": [user(PLACE, own, HELLO), user(PLACE)], "images": ["a.png", "b.png"]}
    taken, images = take_images(record)
    assert images == ["a.png", "own.png", "b.png"]
    assert parts(taken) == [PLACE, PLACE, HELLO, PLACE]
    assert "images" not in taken


def test_images_beside_plain_messages_go_before_the_first_question() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}, user(HELLO)]
    taken, images = take_images({"messages": messages, "images": ["a.png", "b.png"]})
    assert images == ["a.png", "b.png"]
    assert [message["content"] for message in taken["messages"]] == [
        [{"type": "text", "text": "be brief"}],
        [PLACE, PLACE, HELLO],
        [HELLO],
    ]
    assert take_images({"messages": messages, "image": "a.png"})[1] == ["a.png"]


def test_the_images_of_a_prompt_come_before_those_of_its_completion() -> None:
    image = {"type": "image", "image": "answer.png"}
    record = {"prompt": [user(PLACE, HELLO)], "completion": [user(image)], "images": ["asked.png"]}
    taken, images = take_images(record)
    assert images == ["asked.png", "answer.png"]
    assert places_in(taken["prompt"], len(images)) == 1
    assert places_in("<image> as text", 2) == 2


def test_a_plain_text_names_its_images_in_a_list() -> None:
    taken, images = take_images({"text": "<image> hello", "images": ["a.png"]})
    assert (taken, images) == ({"text": "<image> hello"}, ["a.png"])


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a"},
        {"messages": [user("hello")]},
        {"text": "a", "images": []},
        {"text": "a", "image": None},
        {"messages": [user(HELLO), "stray"]},
    ],
)
def test_records_without_images_are_told_apart(record: dict[str, Any]) -> None:
    assert not names_media(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [user(PLACE)]}, r'`images` holds 0, and 1 parts \{"type": "image"\} leave a place'),
        ({"messages": [user(PLACE)], "images": ["a", "b"]}, "`images` holds 2, and 1 parts"),
        ({"messages": [user({**PLACE, "image": "a"})], "images": ["b"]}, "`images` holds 1, and 0 parts"),
        ({"messages": [{"role": "system", "content": "x"}], "images": ["a"]}, "`images` holds 1, and 0 parts"),
        ({"messages": [user(HELLO)], "images": "a.png"}, "`images` is str, expected a list of paths"),
        ({"messages": [user(HELLO)], "images": [3]}, "an image is given as int, expected the path of its file"),
        ({"messages": [user({**PLACE, "image": {"bytes": "x"}})]}, "an image is given as dict"),
        ({"messages": [user({**PLACE, "image": ""})]}, "an image is given as str, expected the path"),
        (
            {"messages": [user({**PLACE, "url": "https://example.org/a.png"})]},
            r"the image https://example\.org/a\.png is not a file; fetch it before and give its path",
        ),
        (
            {"messages": [user({**PLACE, "image": "data:image/png;base64," + "A" * 999})]},
            "the image data:.{55}… is not",
        ),
        ({"messages": [user({"type": "video", "path": "a.mp4"}, PLACE)], "images": ["a"]}, "a part of type 'video'"),
        ({"messages": [user({"type": "text"}, PLACE)], "images": ["a"]}, r"a part \{'type': 'text'\} found, expected"),
        ({"messages": [user("bare", PLACE)], "images": ["a"]}, "a part 'bare' found, expected"),
    ],
)
def test_what_is_wrong_with_images_is_told(record: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        take_images(record)


def test_an_image_is_read_as_rgb_and_upright(tmp_path: Path) -> None:
    left_red = Image.new("RGBA", (4, 2), (0, 0, 255, 255))
    left_red.paste((255, 0, 0, 255), (0, 0, 2, 2))
    left_red.convert("RGB").convert("P").save(tmp_path / "palette.png")
    image = open_image(tmp_path, "palette.png")
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side: to be turned by 90 degrees clockwise
    left_red.convert("RGB").save(tmp_path / "turned.png", exif=exif)
    turned = open_image(tmp_path, "turned.png")
    assert turned.size == (2, 4)
    assert (turned.getpixel((0, 0)), turned.getpixel((0, 3))) == ((255, 0, 0), (0, 0, 255))
    with Image.open(tmp_path / "turned.png") as raw:
        assert raw.size == (4, 2), "the control: as it is stored"


def test_paths_are_relative_to_the_folder_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    Image.new("RGB", (3, 5)).save(tmp_path / "data" / "pictures" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_image(Path("data"), "pictures/a.png").size == (3, 5)
    assert open_image(Path("elsewhere"), str(tmp_path / "data" / "pictures" / "a.png")).size == (3, 5)
    with pytest.raises(InputError, match=r"the image pictures/a\.png does not exist; paths are relative to the data"):
        open_image(Path(), "pictures/a.png")


@pytest.mark.parametrize("damage", ["half", "text", "empty", "folder"])
def test_a_broken_image_is_told_by_its_path(damage: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((40, 40), 80).save(whole)
    broken = tmp_path / "broken.png"
    match damage:
        case "half":
            broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        case "text":
            broken.write_text("no image")
        case "empty":
            broken.touch()
        case "folder":
            broken.mkdir()
    assert open_image(tmp_path, "whole.png").size == (40, 40)
    with pytest.raises(InputError, match=r"the image .*broken\.png cannot be read: "):
        open_image(tmp_path, "broken.png")


def test_an_image_too_large_to_be_honest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"bomb\.png cannot be read: Image size \(10000 pixels\) exceeds limit"):
        open_image(tmp_path, "bomb.png")


def test_without_pillow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="images need Pillow, which is not installed: pip install"):
        open_image(tmp_path, "a.png")
