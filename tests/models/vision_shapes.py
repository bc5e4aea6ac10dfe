"""Ranks and sizes of emulators of a 38-billion-parameter model, by the package's own functions, on meta alone.

    python -m tests.models.vision_shapes 0.1 0.25 0.5

A program of its own, so that the memory that it took can be told. It prints one JSON object.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
from typing import Any

import torch
import transformers

from emloc_tools.files.tensors import TensorSpec
from emloc_tools.linalg.allocate import uniform_ranks
from emloc_tools.models.layers import select_layers
from emloc_tools.models.lowrank_modules import factor_layers
from emloc_tools.models.skeleton import build_skeleton
from emloc_tools.stages.budget import budget_ratio

# InternVL2.5-38B as published: InternViT-6B and Qwen2.5-32B.
VISION = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 151674,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def skeleton() -> Any:
    """The model in bfloat16 with every parameter on meta."""
    config = transformers.InternVLConfig(vision_config=VISION, text_config=TEXT, tie_word_embeddings=False)
    return build_skeleton(transformers.InternVLForConditionalGeneration, config, dtype=torch.bfloat16)


def stored(model: Any) -> int:
    """Bytes of all parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def main(ratios: list[float]) -> None:
    """For every ratio: the ranks, the bytes of the emulator's parameters, and the ratio that these bytes allow."""
    model = skeleton()
    layers = select_layers(model)
    weights = {f"{layer.name}.weight" for layer in layers}
    specs = {name: TensorSpec(name, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}
    dense = [spec for name, spec in specs.items() if name not in weights]
    chosen = {layer.name: (layer, specs[f"{layer.name}.weight"]) for layer in layers}
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "emulators": {}}
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    for ratio in ratios:
        ranks = uniform_ranks(layers, ratio)
        emulator = copy.deepcopy(model)
        factor_layers(emulator, ranks)
        on_meta = on_meta and all(parameter.is_meta for parameter in emulator.parameters())
        size = stored(emulator)
        within = [
            uniform_ranks(layers, budget_ratio(dense, chosen, torch.bfloat16, ratio=None, params=None, size=limit))
            for limit in (size + 2, size + 1)  # the guard is one more value
        ]
        found["emulators"][str(ratio)] = {
            "ranks": ranks,
            "bytes": size,
            "fits": within[0] == ranks,
            "fits in less": within[1] == ranks,
        }
    found["on meta"] = on_meta
    found["peak bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main([float(argument) for argument in sys.argv[1:]])
