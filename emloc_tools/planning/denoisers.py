"""Inputs of the denoisers of diffusers, by the shapes that their pipelines give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.diffusion import DiffusersConfig

PIXELS_PER_LATENT = 8  # in each direction, of the autoencoders of Stable Diffusion and FLUX
WORDS_OF_CLIP = 77
SIZES_OF_SDXL = 6  # of the picture, its crop and its target, each as height and width

Inputs = dict[str, Any]  # tensors, or dictionaries of tensors


def denoiser_inputs(
    model: Any, config: DiffusersConfig, batch: int, length: int, resolution: tuple[int, int]
) -> Inputs:
    """Arguments of a denoiser for `batch` pictures of `resolution` pixels (height, width) and `length` tokens of text.

    Raises `UnsupportedError` for a class whose arguments are not known, `InputError` for a resolution it cannot have.
    """
    make = DENOISERS.get(config.architecture)
    if make is None:
        raise UnsupportedError(
            f"the arguments of {config.architecture} are not known here (those of {', '.join(DENOISERS)} are); give "
            "--data with ready model inputs, which record-inputs writes"
        )
    if any(size % (2 * PIXELS_PER_LATENT) for size in resolution):
        raise InputError(
            f"--resolution {resolution[0]}x{resolution[1]}: both must be multiples of {2 * PIXELS_PER_LATENT}"
        )
    height, width = (size // PIXELS_PER_LATENT for size in resolution)
    found: Inputs = tree_map(lambda tensor: tensor.to(_dtype(model)), make(model.config, batch, length, height, width))
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters())


def _flux(config: Any, batch: int, length: int, height: int, width: int) -> Inputs:
    """Latents in patches of 2 x 2, one token each."""
    tokens = height * width // 4
    guidance = {"guidance": torch.ones(batch)} if config.guidance_embeds else {}
    return {
        "hidden_states": torch.zeros(batch, tokens, config.in_channels),
        "encoder_hidden_states": torch.zeros(batch, length, config.joint_attention_dim),
        "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
        "timestep": torch.ones(batch),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(length, 3),
        **guidance,
    }


def _sd3(config: Any, batch: int, length: int, height: int, width: int) -> Inputs:
    """Text of CLIP and of T5, one behind the other."""
    return {
        "hidden_states": torch.zeros(batch, config.in_channels, height, width),
        "encoder_hidden_states": torch.zeros(batch, WORDS_OF_CLIP + length, config.joint_attention_dim),
        "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
        "timestep": torch.ones(batch),
    }


def _unet(config: Any, batch: int, length: int, height: int, width: int) -> Inputs:
    """Stable Diffusion 1 and 2, and SDXL with its sizes and pooled text beside."""
    found: Inputs = {
        "sample": torch.zeros(batch, config.in_channels, height, width),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": torch.zeros(batch, min(length, WORDS_OF_CLIP), config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - SIZES_OF_SDXL * config.addition_time_embed_dim
        sizes = torch.zeros(batch, SIZES_OF_SDXL)
        return {**found, "added_cond_kwargs": {"text_embeds": torch.zeros(batch, pooled), "time_ids": sizes}}
    if config.addition_embed_type is not None:
        raise UnsupportedError(
            f"the additional embeddings of this UNet ({config.addition_embed_type}) are not known here; give --data "
            "with ready model inputs, which record-inputs writes"
        )
    return found


DENOISERS: dict[str, Callable[[Any, int, int, int, int], Inputs]] = {
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "UNet2DConditionModel": _unet,
}
