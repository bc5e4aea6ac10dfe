"""Which linear layers are treated: by default those inside blocks, otherwise what the user's patterns say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from emloc_tools.errors import InputError
from emloc_tools.models.layers import select_layers
from emloc_tools.records import Layer
from tests import pico

ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
DECODER = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
ENCODER = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
ALBERT = ["ffn", "ffn_output", *(f"attention.{part}" for part in ("query", "key", "value", "dense"))]
DEFAULTS = {
    **{
        family: [f"model.layers.{i}.{part}" for i in range(3) for part in DECODER]
        for family in ("llama", "llama-tied", "qwen2", "qwen3", "gemma3")
    },
    "gpt2": [
        f"transformer.h.{i}.{part}"
        for i in range(3)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    "bert": [
        f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in (*ENCODER, "intermediate.dense", "output.dense")
    ],
    # One shared block; and experts are stacks, see test_experts.
    "albert": [f"albert.encoder.albert_layer_groups.0.albert_layers.0.{part}" for part in ALBERT],
    "qwen3-moe": [f"model.layers.{i}.{part}" for i in range(3) for part in ATTENTION],
}


def model(family: str) -> Any:
    """A model of a family, in memory."""
    return getattr(transformers, pico.CLASSES[family])(pico.config(family))


@pytest.mark.parametrize("family", list(pico.CLASSES))
def test_the_default_is_every_linear_layer_inside_blocks(family: str) -> None:
    built = model(family)
    layers = [layer for layer in select_layers(built) if layer.experts is None]
    assert sorted(layer.name for layer in layers) == sorted(DEFAULTS[family])
    order = [name for name, _ in built.named_modules()]
    assert [layer.name for layer in layers] == sorted(DEFAULTS[family], key=order.index)
    for layer in layers:
        weight = built.get_submodule(layer.name).weight
        matrix = weight.T if family == "gpt2" else weight
        assert (layer.out_features, layer.in_features) == matrix.shape
        assert layer.orientation == ("conv1d" if family == "gpt2" else "linear")
        assert layer.has_bias == (built.get_submodule(layer.name).bias is not None)


class Block(nn.Module):
    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), Conv1D(4, 8)
        self.gate, self.tied = nn.Linear(4, 3), nn.Linear(4, 4)
        self.router = nn.ModuleDict({"layer": nn.Linear(4, 3)})
        self.tied.weight = shared.weight
        self.attention = nn.MultiheadAttention(4, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.stem = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(self.stem), Block(self.stem)])
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])


def names(**options: str) -> list[str]:
    """The names of the layers of `Model` that are selected."""
    return [layer.name for layer in select_layers(Model(), **options)]


def test_routers_heads_shared_weights_and_layers_without_a_forward_of_their_own_stay_dense() -> None:
    assert names() == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def test_targets_replace_the_default_and_are_searched_anywhere_in_the_name() -> None:
    assert names(targets="stem|gate$|tied") == [
        "stem",
        "blocks.0.gate",
        "blocks.0.tied",
        "blocks.1.gate",
        "blocks.1.tied",
    ]
    assert names(targets=r"^heads\.1$") == ["heads.1"]
    assert names(targets=r"router") == ["blocks.0.router.layer", "blocks.1.router.layer"]


def test_exclude_takes_away_from_targets_and_from_the_default() -> None:
    assert names(exclude=r"blocks\.0") == ["blocks.1.up", "blocks.1.down"]
    assert names(targets="up|stem", exclude=r"^blocks\.1") == ["stem", "blocks.0.up"]


def test_layers_tell_shape_orientation_and_bias() -> None:
    assert select_layers(Model(), targets=r"blocks\.0\.(up|down)") == [
        Layer("blocks.0.up", 8, 4, "linear", True),
        Layer("blocks.0.down", 4, 8, "conv1d", True),
    ]


@pytest.mark.parametrize("option", ["targets", "exclude"])
def test_a_bad_pattern_is_refused(option: str) -> None:
    flag = f"--{option}"
    with pytest.raises(InputError, match=rf"{flag} '\(' is not a regular expression"):
        names(**{option: "("})
    with pytest.raises(InputError, match=rf"{flag} 'q_proj' matches no linear layer; there are \d+, such as"):
        names(**{option: "q_proj"})


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(InputError, match=r"--exclude '\.' leaves no layer"):
        names(exclude=".")


def test_a_model_without_blocks_needs_targets() -> None:
    flat = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(InputError, match="Sequential has no linear layer inside repeated blocks; choose by --targets"):
        select_layers(flat)
    assert [layer.name for layer in select_layers(flat, targets=".")] == ["0"]


def test_a_tied_head_is_not_chosen_and_a_saved_model_selects_like_the_one_in_memory(tmp_path: Path) -> None:
    from emloc_tools.models.base import open_base

    built = pico.save_model(tmp_path, "llama-tied")
    skeleton = open_base(str(tmp_path)).model
    assert select_layers(skeleton) == select_layers(built)
    assert "lm_head" in [layer.name for layer in select_layers(skeleton, targets=".")]
