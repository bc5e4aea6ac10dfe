"""Tiny models and pipelines of diffusers, made from configurations: no network, no trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests import pico

SIZE = {"height": 16, "width": 16, "max_sequence_length": 24}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 4, 8],
}


def save_flux(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Save a random FluxTransformer2DModel and return it in evaluation mode."""
    torch.manual_seed(seed)
    model = diffusers.FluxTransformer2DModel(**FLUX).to(dtype).eval()
    model.save_pretrained(folder, **options)
    return model


def save_pipeline(folder: Path, *, seed: int = 0) -> Any:
    """Save a FluxPipeline with random weights and byte-level tokenizers, and return its transformer."""
    transformer = save_flux(folder / "transformer", seed=seed)
    pico.save_tokenizer(folder / "tokenizer")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.model_max_length = 24
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {"vocab_size": pico.VOCABULARY, "max_position_embeddings": 24, "projection_dim": 32, "eos_token_id": 2}
    t5 = {"vocab_size": pico.VOCABULARY, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    vae = {"in_channels": 3, "out_channels": 3, "block_out_channels": (4,), "layers_per_block": 1, "latent_channels": 1}
    quantisers = {"use_quant_conv": False, "use_post_quant_conv": False}
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **text)),
        tokenizer=tokenizer,
        text_encoder_2=transformers.T5EncoderModel(transformers.T5Config(**t5)),
        tokenizer_2=tokenizer,
        transformer=transformer,
        vae=diffusers.AutoencoderKL(
            **vae, **quantisers, norm_num_groups=1, sample_size=32, shift_factor=0.06, scaling_factor=1.5
        ),
    )
    pipeline.save_pretrained(folder)
    return transformer


def load_pipeline(folder: Path) -> Any:
    """The pipeline in a folder, silent."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
