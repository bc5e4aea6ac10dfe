"""Tiny models that read images, with processors made from configurations, and pictures to ask about: no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw

from tests import pico

FAMILIES = ("llava", "internvl", "qwen2.5-vl")
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
}
# The tokens of a tokenizer that its family's processor asks for by name; their ids follow those of the text.
SPECIAL = {
    "llava": {"image_token": "<image>"},
    "internvl": {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "qwen2.5-vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
}
MARKS = {
    "llava": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "qwen2.5-vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
# As many published templates do, this looks for parts and passes over a plain string.
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}MARK{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SIDE, PATCH = 28, 7  # pixels of an image for LLaVA and of a tile for InternVL, and of their patches
VOCABULARY = 272
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
COLOURS = {"red": (220, 30, 30), "green": (20, 170, 40), "blue": (30, 50, 210), "yellow": (230, 210, 20)}


def token(family: str, name: str) -> int:
    """The id of one of the special tokens of a family."""
    return pico.VOCABULARY + list(SPECIAL[family]).index(name)


def config(family: str) -> Any:
    """The configuration of a family."""
    text = {**pico.LLAMA, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"num_hidden_layers": 2, "max_position_embeddings": 256}
    match family:
        case "llava":
            return transformers.LlavaConfig(
                vision_config={"model_type": "clip_vision_model", **TOWER, "image_size": SIDE, "patch_size": PATCH},
                text_config={"model_type": "llama", **text},
                image_token_index=token(family, "image_token"),
                image_seq_length=(SIDE // PATCH) ** 2,
            )
        case "internvl":
            return transformers.InternVLConfig(
                vision_config={**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
                text_config={"model_type": "qwen2", **text},
                image_token_id=token(family, "context_image_token"),
                image_seq_length=(SIDE // PATCH) ** 2 // 4,
                downsample_ratio=0.5,
            )
        case "qwen2.5-vl":
            rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
            return transformers.Qwen2_5_VLConfig(
                text_config={**text, "rope_parameters": rope},
                vision_config={
                    **{"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "patch_size": PATCH},
                    **{"spatial_merge_size": 2, "out_hidden_size": 32, "window_size": 28, "fullatt_block_indexes": [1]},
                },
                image_token_id=token(family, "image_token"),
                video_token_id=token(family, "video_token"),
                vision_start_token_id=token(family, "vision_start_token"),
                vision_end_token_id=token(family, "vision_end_token"),
            )
    raise ValueError(family)


def save_model(folder: Path, family: str, *, seed: int = 0) -> Any:
    """Save a random model with its processor and return it in evaluation mode."""
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[family])(config(family)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data *= 4  # the default initialisation makes attention nearly uniform
    model.save_pretrained(folder)
    save_processor(folder, family)
    return model


def save_processor(folder: Path, family: str) -> None:
    """Save a processor's files: LLaVA's as transformers 5 writes them, the others as their publishers did."""
    pico.save_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=SPECIAL[family])
    tokenizer.save_pretrained(folder)
    template = CHAT_TEMPLATE.replace("MARK", MARKS[family])
    match family:
        case "llava":
            size = {"height": SIDE, "width": SIDE}
            images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
            transformers.LlavaProcessor(
                images,
                tokenizer,
                patch_size=PATCH,
                vision_feature_select_strategy="default",
                num_additional_image_tokens=1,
                chat_template=template,
            ).save_pretrained(folder)
        case "internvl":
            settings = {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True}
            settings |= {"size": {"height": SIDE, "width": SIDE}, "min_patches": 1, "max_patches": 3}
            _write(folder / "preprocessor_config.json", {**settings, "processor_class": "InternVLProcessor"})
            own = {"image_seq_length": (SIDE // PATCH) ** 2 // 4, "processor_class": "InternVLProcessor"}
            _write(folder / "processor_config.json", own)
            (folder / "chat_template.jinja").write_text(template)
        case "qwen2.5-vl":
            settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
            settings |= {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
            _write(
                folder / "preprocessor_config.json",
                {**settings, "min_pixels": 4 * PATCH**2, "max_pixels": 40 * PATCH**2},
            )
            _write(folder / "chat_template.json", {"chat_template": template})


def save_pictures(folder: Path, count: int = 6) -> list[str]:
    """PNG files of ellipses in different colours and sizes; their names begin with the colour."""
    folder.mkdir(exist_ok=True)
    names = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        width, height = 30 + 17 * (number % 5), 24 + 23 * (number % 3)
        image = Image.effect_noise((width, height), 60).convert("RGB")
        ImageDraw.Draw(image).ellipse((3, 3, width - 4 - number, height - 4), fill=COLOURS[colour])
        names.append(f"{colour}-{number}.png")
        image.save(folder / names[-1])
    return names


def question(picture: str, *, text: str = "Which colour?") -> dict[str, Any]:
    """What a user asks about a picture, in the form of chat templates."""
    return {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    """What an assistant says."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
