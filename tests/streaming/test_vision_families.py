"""Processors return what their models need, in any number and shape: padded images, tiles, masks of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools.data.batches import load_batches
from emloc_tools.errors import InputError
from emloc_tools.models.source import open_source
from emloc_tools.stages.calibrate import calibrate
from tests import pico, pico_vision
from tests.pico_vision import PATCH, SIDE, TOWER, answer, question
from tests.stages.loss_reference import data_part, unpacked
from tests.stages.reference import close_to
from tests.vision_reference import moments

SQUARE = {"height": SIDE, "width": SIDE}
IMAGE = pico.VOCABULARY  # the first of the special tokens that a family adds
TEXT: dict[str, Any] = {
    **pico.LLAMA,
    **{"vocab_size": pico_vision.VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 512},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": SIDE, "patch_size": PATCH}


def llava_next(folder: Path) -> Any:
    """As many tiles as an image needs, padded to the most in a batch, and the sizes of the images."""
    tiles = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=tiles
    )
    transformers.LlavaNextProcessor(
        images,
        tokenizer(folder, image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    ).save_pretrained(folder)
    return transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        image_grid_pinpoints=tiles,
    )


def idefics3(folder: Path) -> Any:
    """Tiles with a mask of their pixels, and marks for rows and columns in the text."""
    special = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        tokenizer(folder, image_token="<image>", end_of_utterance_token="<end_of_utterance>", **special),
        image_seq_len=4,
        chat_template=template("<image>"),
    ).save_pretrained(folder)
    return transformers.Idefics3Config(
        vision_config={**TOWER, "image_size": SIDE, "patch_size": PATCH},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def gemma3(folder: Path) -> Any:
    """The types of tokens, as an image's tokens see each other in both directions."""
    transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size=SQUARE),
        tokenizer(folder, image_token="<soft>", boi_token="<start_of_image>", eoi_token="<end_of_image>"),
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    ).save_pretrained(folder)
    return transformers.Gemma3Config(
        vision_config={**TOWER, "image_size": SIDE, "patch_size": PATCH},
        text_config={**TEXT, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
    )


def mllama(folder: Path) -> Any:
    """One token for an image, which other layers look at; a mask of which token sees which image."""
    transformers.MllamaProcessor(
        transformers.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2),
        tokenizer(folder, image_token="<|image|>"),
        chat_template=template("<|image|>"),
    ).save_pretrained(folder)
    return transformers.MllamaConfig(
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_global_layers": 1},
            **{"attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "vision_output_dim": 64},
            **{"intermediate_layers_indices": [0], "max_num_tiles": 2},
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={
            **TEXT,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        image_token_index=IMAGE,
    )


# Each with a model input of its own, and with batch sizes. In a batch with an image Mllama gives samples without one an
# empty image, and computes with it; so no batch has several samples there.
FAMILIES = {
    "LlavaNextForConditionalGeneration": (llava_next, "image_sizes", (1, 2)),
    "Idefics3ForConditionalGeneration": (idefics3, "pixel_attention_mask", (1, 2)),
    "Gemma3ForConditionalGeneration": (gemma3, "token_type_ids", (1, 2)),
    "MllamaForConditionalGeneration": (mllama, "cross_attention_mask", (1,)),
}


def tokenizer(folder: Path, **special: str) -> Any:
    """A tokenizer with the special tokens that a processor asks for, saved."""
    pico.save_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    made = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=special)
    made.save_pretrained(folder)
    return made


def template(mark: str) -> str:
    """The chat template of a family."""
    return pico_vision.CHAT_TEMPLATE.replace("MARK", mark)


def save(folder: Path, name: str, config: Callable[[Path], Any]) -> Any:
    """A random model with its processor."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(folder)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", list(FAMILIES))
def test_grams_are_those_of_every_row_whatever_the_processor_returns(name: str, tmp_path: Path) -> None:
    config, argument, sizes = FAMILIES[name]
    model = save(tmp_path, name, config)
    pictures = pico_vision.save_pictures(tmp_path / "pictures", 5)
    chats = [
        [question(f"pictures/{picture}", text="Which?" + "?" * place), answer("so")]
        for place, picture in enumerate(pictures)
    ]
    plain = [{"role": "user", "content": "Hello"}, answer("Hi")]
    data = pico.write_jsonl(tmp_path / "data.jsonl", [{"messages": chat} for chat in (*chats, plain)])
    options: dict[str, Any] = {"samples": None, "max_length": None, "seed": 0}
    source = open_source(str(tmp_path))
    assert argument in load_batches(data, source, batch_size=2, **options)[0].inputs
    calls = [dict(batch.inputs.items()) for batch in load_batches(data, source, batch_size=1, **options)]
    for size in sizes:
        calibrate(base=str(tmp_path), data=data, output=tmp_path / f"by {size}", batch_size=size, device="cpu")
        found = {layer: of for layers, of in data_part(tmp_path / f"by {size}").items() for layer in layers}
        expected = moments(model, calls, found)
        assert any("vision" in layer for layer in found)
        for layer, (side, rows, packed) in found.items():
            inputs, outputs, real = expected[layer]
            G = inputs if side == "input" else outputs
            assert close_to(unpacked(packed, len(G)), G) < 1e-5, layer
            assert rows == real, layer


def test_a_processor_with_labels_of_its_own_is_refused(tmp_path: Path) -> None:
    images = transformers.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    transformers.PaliGemmaProcessor(
        images, tokenizer(tmp_path, image_token="<image>"), chat_template=template("<image>")
    ).save_pretrained(tmp_path)
    transformers.PaliGemmaConfig(
        vision_config={**TOWER, "image_size": SIDE, "patch_size": PATCH},
        text_config={"model_type": "gemma", **TEXT},
        image_token_index=IMAGE,
    ).save_pretrained(tmp_path)
    (picture,) = pico_vision.save_pictures(tmp_path / "pictures", 1)
    chat = {"messages": [question(f"pictures/{picture}"), answer("red")]}
    data = pico.write_jsonl(tmp_path / "data.jsonl", [chat])
    message = r"data\.jsonl:1: PaliGemmaProcessor tells questions from answers by itself"
    with pytest.raises(InputError, match=message):
        load_batches(data, open_source(str(tmp_path)), samples=None, max_length=None, batch_size=1, seed=0)
