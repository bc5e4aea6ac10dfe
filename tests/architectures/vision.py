"""Models of images, and of images beside texts."""

from __future__ import annotations

from typing import Any

import transformers

from tests.architectures.family import IMAGE, SIZES, VOCABULARY, Draw, Family, Inputs, configured, padded

VISION = "vision"
BOTH = "vision and text"
TWO = "ImageClassification is the image tower alone"
TOWER = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
TOWERS: dict[str, Any] = {"text_config": {**SIZES, "max_position_embeddings": 20}, "vision_config": {**TOWER, **IMAGE}}
SWIN: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
}


def pictures(draw: Draw) -> list[Inputs]:
    """Images with their classes."""
    return [{"pixel_values": draw.values(3, 3, 32, 32), "labels": draw.classes(3)} for _ in range(2)]


def captions(draw: Draw) -> list[Inputs]:
    """Images and texts. Those of the first batch are padded, to as many tokens as an image has rows.

    The last real token is the one with the largest id, at which CLIP reads off what a text means.
    """
    batches = whole_captions(draw)
    batches[0]["input_ids"][1, -6] = VOCABULARY - 1
    return [padded(batches[0], 1, slice(-5, None)), batches[1]]


def whole_captions(draw: Draw) -> list[Inputs]:
    """Images and texts of one length: SigLIP knows no padding, and reads off every text at its last token."""
    return [{"input_ids": draw.ids(3, length), "pixel_values": draw.values(3, 3, 32, 32)} for length in (17, 12)]


def classifier(name: str, prefix: str, **changes: Any) -> Family:
    """A family `<prefix>ForImageClassification` with `<prefix>Config`."""
    make = configured(f"{prefix}Config", **{**IMAGE, **changes})
    return Family(name, f"{prefix}ForImageClassification", VISION, make, pictures)


FAMILIES = (
    classifier("ViT", "ViT"),
    classifier("DINOv2", "Dinov2", mlp_ratio=2),
    Family("Swin", "SwinForImageClassification", VISION, lambda: transformers.SwinConfig(**SWIN), pictures),
    Family("CLIP", "CLIPModel", BOTH, configured("CLIPConfig", **TOWERS, projection_dim=16), captions, notes=TWO),
    Family("SigLIP", "SiglipModel", BOTH, configured("SiglipConfig", **TOWERS), whole_captions, notes=TWO),
)
