"""The processor of a base is found in every layout of its files, with and without torchvision, or refused in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image

from emloc_tools.errors import InputError
from emloc_tools.models.processors import load_processor, load_tokenizer, placeholders, reads_images
from emloc_tools.models.skeleton import load_config
from emloc_tools.models.source import Source, open_source
from tests import pico, pico_vision


@pytest.fixture
def source(family: str, tmp_path: Path) -> Source:
    """A base of a family: its configuration and its processor's files, and no weights."""
    return make(tmp_path, family)


def make(folder: Path, family: str) -> Source:
    pico_vision.config(family).save_pretrained(folder)
    pico_vision.save_processor(folder, family)
    return open_source(str(folder))


@pytest.mark.parametrize("family", pico_vision.FAMILIES)
def test_the_processor_makes_of_text_and_image_what_the_model_takes(family: str, source: Source) -> None:
    """Against arithmetic: one token for 49 pixels (LLaVA) or four times as many, between the family's own marks."""
    config = load_config(source)
    processor = load_processor(source, config)
    picture = Image.new("RGB", (28, 42), (255, 0, 0))
    found = processor(text=["a" + pico_vision.MARKS[family] + "b"], images=[[picture]], return_tensors="pt")
    special = {name: pico_vision.token(family, name) for name in pico_vision.SPECIAL[family]}
    match family:
        case "llava":  # scaled and cut to 28 x 28
            between = [special["image_token"]] * 16
        case "internvl":  # two tiles of 28 x 28 and one of the whole
            tokens = [special["context_image_token"]] * 4 * 3
            between = [special["start_image_token"], *tokens, special["end_image_token"]]
        case _:  # 4 x 6 patches, of which 2 x 2 become one token
            tokens = [special["image_token"]] * 6
            between = [special["vision_start_token"], *tokens, special["vision_end_token"]]
    a, b = (4 + ord(letter) - ord("!") for letter in "ab")
    assert found["input_ids"].tolist() == [[a, *between, b]]
    # A picture of one colour stays one, whatever the scaling: three values, each in its own place.
    values = {round(value, 4) for value in found["pixel_values"].unique().tolist()}
    statistics = zip(processor.image_processor.image_mean, processor.image_processor.image_std, (1, 0, 0), strict=True)
    assert values == {round((full - mean) / deviation, 4) for mean, deviation, full in statistics}


@pytest.mark.parametrize("family", pico_vision.FAMILIES)
def test_placeholders_are_those_of_the_model_and_its_processor(family: str, source: Source) -> None:
    config = load_config(source)
    expected = {
        "llava": {"image_token"},
        "internvl": {"context_image_token", "start_image_token", "end_image_token"},
        "qwen2.5-vl": {"image_token", "video_token"},
    }
    found = placeholders(config, load_processor(source, config))
    assert found == {pico_vision.token(family, name) for name in expected[family]}


def test_which_models_read_images_is_in_their_configuration() -> None:
    assert [reads_images(pico_vision.config(family)) for family in pico_vision.FAMILIES] == [True] * 3
    assert [reads_images(pico.config(family)) for family in ("llama", "bert", "qwen3-moe")] == [False] * 3
    assert not reads_images(transformers.T5Config())


@pytest.mark.parametrize("family", pico_vision.FAMILIES)
def test_the_tokenizer_has_the_processors_chat_template(family: str, source: Source) -> None:
    """Also that of older releases, which no tokenizer reads by itself."""
    assert pico_vision.MARKS[family] in load_tokenizer(source).chat_template


def test_a_base_without_a_processor_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path, "qwen2.5-vl")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no usable processor for images|holds no processor for images"):
        load_processor(source, load_config(source))
    pico.save_model(tmp_path / "text")
    text = open_source(str(tmp_path / "text"))
    with pytest.raises(InputError, match=r"holds no processor for images \(preprocessor_config\.json\)"):
        load_processor(text, load_config(text))


def test_a_damaged_processor_is_refused_in_one_line(tmp_path: Path) -> None:
    source = make(tmp_path, "internvl")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="no usable processor for images: ") as caught:
        load_processor(source, load_config(source))
    assert "\n" not in str(caught.value)


def test_without_pillow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path, "llava")
    config = load_config(source)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="images need Pillow"):
        load_processor(source, config)
