"""Inputs of the denoisers of diffusers, by the shapes that their pipelines give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.diffusion import DiffusersConfig

PIXELS_PER_LATENT = 8  # in each direction, of the autoencoders of Stable Diffusion and FLUX
WORDS_OF_CLIP = 77

Inputs = dict[str, torch.Tensor]


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
    found = make(model.config, batch, length, height, width)
    return {name: tensor.to(_dtype(model)) for name, tensor in found.items()}


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
    """Stable Diffusion 1 and 2. SDXL takes a dictionary besides, which no file of inputs can hold."""
    if config.addition_embed_type is not None:
        raise UnsupportedError(
            f"this UNet takes additional embeddings ({config.addition_embed_type}) in a dictionary, which is not "
            "supported"
        )
    return {
        "sample": torch.zeros(batch, config.in_channels, height, width),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": torch.zeros(batch, min(length, WORDS_OF_CLIP), config.cross_attention_dim),
    }


DENOISERS: dict[str, Callable[[Any, int, int, int, int], Inputs]] = {
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "UNet2DConditionModel": _unet,
}
