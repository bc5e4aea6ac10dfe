"""The models that `benchmarks.plan` looks at: small ones to measure, and large ones from published numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emloc_tools.planning.inputs import Shape

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Accuracy:
    """A step that is both foreseen and run."""

    name: str
    config: dict[str, Any]
    architecture: str
    shape: Shape
    ratio: float = 1.0
    dtype: str = "bfloat16"
    checkpointing: bool = True
    optimizer: str = "adamw"
    rank: int = 16


@dataclass(frozen=True)
class Case:
    """A model that is only foreseen, in `memory` bytes. `paper` are its peaks of base and emulator in GB, if it has."""

    name: str
    config: dict[str, Any]
    architecture: str
    shape: Shape
    memory: int
    step: str
    paper: tuple[float, float] | None = None
    rank: int = field(default=16)


def save_config(folder: Path, config: dict[str, Any], architecture: str) -> None:
    """Write a config.json; that of a model of diffusers has its class name already."""
    folder.mkdir(parents=True)
    named = config if "_class_name" in config else {**config, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(named), encoding="utf-8")


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _qwen2(*shape: int) -> dict[str, Any]:
    """The same arithmetic as Llama's, with biases in the attention."""
    return {**_llama(*shape), "model_type": "qwen2"}


def _internvl(text: dict[str, Any], vision: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {
        "model_type": "internvl",
        "text_config": text,
        "vision_config": {"model_type": "internvl_vision", **vision},
        "image_token_id": text["vocab_size"] - 1,
        "image_seq_length": tokens,
    }


INTERNVIT_6B = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "use_qk_norm": True,
    "attention_bias": False,
}
FLUX_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}

SMALL = _llama(512, 1408, 8, 8, 2, 8192)
SMALL_GPT2 = {"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 512, "vocab_size": 8192}
SMALL_MOE = {
    **_llama(384, 1024, 4, 6, 2, 8192),
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
SMALL_VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": [224, 224],
    "patch_size": [14, 14],
}
SMALL_INTERNVL = _internvl(_llama(512, 1408, 4, 8, 2, 8192), SMALL_VISION, 64)
SMALL_FLUX = {
    **FLUX_DEV,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "joint_attention_dim": 512,
    "axes_dims_rope": [8, 28, 28],
}

TEXT, VLM, DENOISER = "LlamaForCausalLM", "InternVLForConditionalGeneration", "FluxTransformer2DModel"
SHORT, LONG = Shape(4, 256), Shape(1, 1024)
ACCURACY = (
    Accuracy("Llama, 4 x 256", SMALL, TEXT, SHORT),
    Accuracy("Llama, 4 x 256", SMALL, TEXT, SHORT, ratio=0.25),
    Accuracy("Llama, 4 x 256", SMALL, TEXT, SHORT, ratio=0.25, checkpointing=False),
    Accuracy("Llama, 4 x 256", SMALL, TEXT, SHORT, checkpointing=False),
    Accuracy("Llama, 4 x 256", SMALL, TEXT, SHORT, dtype="float32", checkpointing=False),
    Accuracy("Llama, 1 x 1024", SMALL, TEXT, LONG),
    Accuracy("Llama, 1 x 1024", SMALL, TEXT, LONG, ratio=0.1, dtype="float32"),
    Accuracy("Llama, 1 x 1024, LoRA of rank 64", SMALL, TEXT, LONG, ratio=0.1, rank=64, optimizer="sgd"),
    Accuracy("Llama, 1 x 32, LoRA of rank 64", SMALL, TEXT, Shape(1, 32), ratio=0.1, rank=64),
    Accuracy("Llama, 1 x 32, LoRA of rank 64", SMALL, TEXT, Shape(1, 32), ratio=0.1, rank=64, optimizer="adafactor"),
    Accuracy("GPT-2, 4 x 256", SMALL_GPT2, "GPT2LMHeadModel", SHORT),
    Accuracy("GPT-2, 4 x 256", SMALL_GPT2, "GPT2LMHeadModel", SHORT, ratio=0.25, checkpointing=False),
    Accuracy("Qwen3-MoE, 4 x 256", SMALL_MOE, "Qwen3MoeForCausalLM", SHORT),
    Accuracy("Qwen3-MoE, 4 x 256", SMALL_MOE, "Qwen3MoeForCausalLM", SHORT, ratio=0.5, checkpointing=False),
    Accuracy("InternVL, 4 images, 1 x 512", SMALL_INTERNVL, VLM, Shape(1, 512, images=4)),
    Accuracy("InternVL, 4 images, 1 x 512", SMALL_INTERNVL, VLM, Shape(1, 512, images=4), 0.25, checkpointing=False),
    Accuracy("FLUX, 512 x 512 and 128 tokens", SMALL_FLUX, DENOISER, Shape(1, 128, resolution=(512, 512))),
    Accuracy(
        "FLUX, 512 x 512 and 128 tokens",
        SMALL_FLUX,
        DENOISER,
        Shape(1, 128, resolution=(512, 512)),
        ratio=0.25,
        checkpointing=False,
    ),
)

TILES, PICTURE = Shape(1, 2048, images=7), Shape(1, 512, resolution=(1024, 1024))
IN_TEXT, IN_TILES = "2,048 tokens", "2,048 tokens, of which 7 tiles take 1,792"
CASES = (
    Case(
        "InternVL2.5-26B",
        _internvl(_llama(6144, 16384, 48, 48, 8, 92553), INTERNVIT_6B, 256),
        VLM,
        TILES,
        int(18.6 * GB),
        IN_TILES,
        (72.9, 18.6),
    ),
    Case(
        "InternVL2.5-38B",
        _internvl(_qwen2(5120, 27648, 64, 40, 8, 151674), INTERNVIT_6B, 256),
        VLM,
        TILES,
        int(20.1 * GB),
        IN_TILES,
        (94.8, 20.1),
    ),
    Case("FLUX.1-dev", FLUX_DEV, DENOISER, PICTURE, int(22.9 * GB), "1024 x 1024 and 512 tokens", (35.1, 22.9)),
    Case("Llama-3.1-8B", _llama(4096, 14336, 32, 32, 8, 128256), TEXT, Shape(1, 2048), 16 * GIB, IN_TEXT),
    Case("Llama-3.1-70B", _llama(8192, 28672, 80, 64, 8, 128256), TEXT, Shape(1, 2048), 48 * GIB, IN_TEXT),
    Case("Qwen2.5-32B", _qwen2(5120, 27648, 64, 40, 8, 152064), "Qwen2ForCausalLM", Shape(1, 2048), 24 * GIB, IN_TEXT),
)
