"""The inverse of transformers' conversions, tensor by tensor: what a stock class saves, and what needs several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.core_model_loading import Chunk, WeightConverter

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.tensors import TensorSpec
from emloc_tools.models.checkpoint_form import checkpoint_form, plan_checkpoint
from tests import pico


def model_of(family: str) -> Any:
    return getattr(transformers, pico.CLASSES[family])(pico.config(family))


def specs_of(model: Any) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


def test_every_expert_gets_its_own_part_of_the_fused_tensor() -> None:
    model = model_of("qwen3-moe")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    fused = model.state_dict()[name]  # (experts, gate and up, in)
    found = checkpoint_form(model, {name: fused})
    side = fused.shape[1] // 2
    for number in range(4):
        gate, up = (found.pop(f"model.layers.0.mlp.experts.{number}.{part}_proj.weight") for part in ("gate", "up"))
        assert torch.equal(gate, fused[number, :side])
        assert torch.equal(up, fused[number, side:])
    assert not found


def test_the_plan_says_what_the_tensors_become() -> None:
    model = model_of("qwen3-moe")
    planned = {(spec.name, spec.dtype, spec.shape) for spec in plan_checkpoint(model, specs_of(model))}
    found = [checkpoint_form(model, {name: tensor}) for name, tensor in model.state_dict().items()]
    assert planned == {(n, t.dtype, tuple(t.shape)) for parts in found for n, t in parts.items()}


def test_several_tensors_that_become_one_are_refused() -> None:
    """As if the checkpoint held q, k and v as one tensor: one of them alone gives something else."""
    model = model_of("llama")
    plan_checkpoint(model, specs_of(model))  # the control
    patterns = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    joined = WeightConverter("self_attn.qkv_proj.weight", patterns, operations=[Chunk(dim=0)])
    model._weight_conversions = [joined]
    with pytest.raises(UnsupportedError, match=r"joins several.*qkv_proj"):
        plan_checkpoint(model, specs_of(model))
