"""Models of images, and of images beside texts."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.architectures.family import IMAGE, SIZES, Draw, Family, Inputs, configured

VISION = "vision"
BOTH = "vision and text"
TOWER = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
TOWERS: dict[str, Any] = {"text_config": {**SIZES, "max_position_embeddings": 16}, "vision_config": {**TOWER, **IMAGE}}
SWIN: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
}


def pictures(draw: Draw) -> list[Inputs]:
    """Images with their classes."""
    return [{"pixel_values": draw.values(3, 3, 32, 32), "labels": draw.classes(3)} for _ in range(2)]


def captions(draw: Draw) -> list[Inputs]:
    """Images and texts; one text is padded."""
    batches = [{"input_ids": draw.ids(3, length), "pixel_values": draw.values(3, 3, 32, 32)} for length in (12, 16)]
    batches[0]["attention_mask"] = torch.ones_like(batches[0]["input_ids"])
    batches[0]["attention_mask"][1, -5:] = 0
    return batches


def classifier(name: str, prefix: str, **changes: Any) -> Family:
    """A family `<prefix>ForImageClassification` with `<prefix>Config`."""
    make = configured(f"{prefix}Config", **{**IMAGE, **changes})
    return Family(name, f"{prefix}ForImageClassification", VISION, make, pictures)


FAMILIES = (
    classifier("ViT", "ViT"),
    classifier("DINOv2", "Dinov2", mlp_ratio=2),
    Family("Swin", "SwinForImageClassification", VISION, lambda: transformers.SwinConfig(**SWIN), pictures),
    Family("CLIP", "CLIPModel", BOTH, configured("CLIPConfig", **TOWERS, projection_dim=16), captions),
    Family("SigLIP", "SiglipModel", BOTH, configured("SiglipConfig", **TOWERS), captions),
)
