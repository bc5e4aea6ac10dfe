"""Denoisers of diffusers. Their emulators are loaded by the AutoModel of that library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.architectures.family import Draw, Family, Inputs

IMAGES = "latents and text"
FLUX = {
    **{"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16},
    **{"num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": [4, 4, 8]},
}
SD3 = {
    **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16},
    **{"num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20},
    **{"out_channels": 4, "pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": [0]},
}
UNET = {
    **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [16, 32]},
    **{"norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 4},
    **{"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]},
    **{"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
}


@dataclass(frozen=True)
class Denoiser(Family):
    """A family of diffusers, whose configurations are dictionaries."""

    def make(self) -> Any:
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, self.model)(**self.config())
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
                elif name == "weight" and isinstance(module, torch.nn.Linear):
                    parameter.data *= self.spread
        return model.to(self.dtype).eval()

    def load(self, folder: Path, **options: Any) -> Any:
        import diffusers

        return getattr(diffusers, self.model).from_pretrained(folder, **{"dtype": self.dtype, **options}).eval()

    def auto_classes(self, folder: Path) -> list[str]:
        return ["AutoModel"]

    def load_by(self, auto_class: str, folder: Path, **options: Any) -> tuple[Any, set[str]]:
        import diffusers

        has_code = (folder / "modeling_emloc.py").exists()  # diffusers refuses to trust what is not there
        trust = {"trust_remote_code": True} if has_code else {}
        model = getattr(diffusers, auto_class).from_pretrained(str(folder), **trust, **{"dtype": self.dtype, **options})
        return model.eval(), {name for name, tensor in model.named_parameters() if tensor.is_meta}


def flux(draw: Draw) -> list[Inputs]:
    """Packed latents with position ids, and texts."""
    return [
        {
            "hidden_states": draw.values(2, 16, 4),
            "encoder_hidden_states": draw.values(2, length, 24),
            "pooled_projections": draw.values(2, 20),
            "timestep": draw.values(2).abs().clamp(max=1),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "txt_ids": torch.zeros(length, 3),
        }
        for length in (7, 5)
    ]


def sd3(draw: Draw) -> list[Inputs]:
    """Latents and texts."""
    return [
        {
            "hidden_states": draw.values(2, 4, 8, 8),
            "encoder_hidden_states": draw.values(2, length, 24),
            "pooled_projections": draw.values(2, 20),
            "timestep": 1000 * draw.values(2).abs().clamp(max=1),
        }
        for length in (7, 5)
    ]


def unet(draw: Draw) -> list[Inputs]:
    """Latents and texts."""
    return [
        {
            "sample": draw.values(2, 4, 8, 8),
            "timestep": draw.classes(2, 1000),
            "encoder_hidden_states": draw.values(2, length, 24),
        }
        for length in (7, 5)
    ]


NOTE = "of diffusers; a loss by recorded targets"
FAMILIES = (
    Denoiser("FLUX", "FluxTransformer2DModel", IMAGES, lambda: FLUX, flux, sharded=True, notes=NOTE),
    Denoiser("Stable Diffusion 3", "SD3Transformer2DModel", IMAGES, lambda: SD3, sd3, notes=NOTE),
    Denoiser("Stable Diffusion", "UNet2DConditionModel", IMAGES, lambda: UNET, unet, notes=NOTE),
)
