"""Models that read images and texts together and predict text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.architectures.family import IMAGE, SIZES, Draw, Family, Inputs, padded
from tests.architectures.vision import TOWER

BOTH = "vision and text"
START, END, IMAGES, VIDEOS = 90, 91, 92, 93  # token ids; those drawn for texts may hit START and END, which is harmless
TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN_VISION: dict[str, Any] = {
    **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4},
    **{"spatial_merge_size": 2, "out_hidden_size": 32},
}
QWEN_TOKENS = {
    **{"image_token_id": IMAGES, "video_token_id": VIDEOS, "vision_start_token_id": START},
    **{"vision_end_token_id": END},
}


def with_images(draw: Draw, tokens: int, images: Callable[[Draw], Inputs], *, typed: bool = False) -> list[Inputs]:
    """Two batches of a text with `tokens` image tokens each, the second padded, and one without an image."""
    batches = []
    for length in (tokens + 9, tokens + 7):
        ids = plain(draw, 1, length)
        ids[0, 2], ids[0, 3 + tokens] = START, END
        ids[0, 3 : 3 + tokens] = IMAGES
        batches.append({"input_ids": ids, "labels": ids.masked_fill(ids == IMAGES, -100), **images(draw)})
        if typed:
            batches[-1]["mm_token_type_ids"] = (ids == IMAGES).int()
    batches[1] = padded(batches[1], 0, slice(-3, None))
    ids = plain(draw, 3, 17)
    batches.append({"input_ids": ids, "labels": ids.clone()})
    return batches


def plain(draw: Draw, rows: int, length: int) -> torch.Tensor:
    """Token ids without those that stand for images."""
    return draw.ids(rows, length).clamp(max=START - 1)


def whole(draw: Draw) -> Inputs:
    """An image as it is."""
    return {"pixel_values": draw.values(1, 3, 32, 32)}


def patches(draw: Draw) -> Inputs:
    """An image of 4 x 4 patches in Qwen's form."""
    return {"pixel_values": draw.values(16, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def llava() -> Any:
    """CLIP's tower and a Llama."""
    return transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER, **IMAGE},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGES,
        image_seq_length=16,
    )


def intern_vl() -> Any:
    """InternViT and a Qwen2."""
    return transformers.InternVLConfig(
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGES,
        downsample_ratio=0.5,
    )


def qwen_2_5() -> Any:
    """A tower with windows and a Qwen2.5."""
    return transformers.Qwen2_5_VLConfig(
        text_config=QWEN_TEXT,
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    )


def qwen_3() -> Any:
    """A tower whose blocks feed the first ones of the language model, and a Qwen3."""
    return transformers.Qwen3VLConfig(
        text_config={**QWEN_TEXT, "head_dim": 8},
        vision_config={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **QWEN_TOKENS,
    )


def gemma() -> Any:
    """SigLIP's tower and a Gemma3."""
    return transformers.Gemma3Config(
        vision_config={**TOWER, **IMAGE},
        text_config={**TEXT, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        image_token_index=IMAGES,
        boi_token_index=START,
        eoi_token_index=END,
    )


FAMILIES = (
    Family("LLaVA", "LlavaForConditionalGeneration", BOTH, llava, lambda draw: with_images(draw, 16, whole)),
    Family(
        "InternVL",
        "InternVLForConditionalGeneration",
        BOTH,
        intern_vl,
        lambda draw: with_images(draw, 4, whole),
        torch.bfloat16,
        sharded=True,
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        BOTH,
        qwen_2_5,
        lambda draw: with_images(draw, 4, patches, typed=True),
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        BOTH,
        qwen_3,
        lambda draw: with_images(draw, 4, patches, typed=True),
    ),
    Family(
        "Gemma3 (vision)",
        "Gemma3ForConditionalGeneration",
        BOTH,
        gemma,
        lambda draw: with_images(draw, 4, whole, typed=True),
    ),
)
