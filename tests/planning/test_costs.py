"""What the stages need, against what was recorded of real runs."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from benchmarks.billion import SHAPES
from benchmarks.record import RESULTS
from emloc_tools.models.layers import select_layers
from emloc_tools.models.skeleton import build_skeleton
from emloc_tools.planning.costs import StageNeeds, grams_of, inference_and_groups, sizes_of, stage_needs
from emloc_tools.records import Layer
from tests import pico

RECORD = json.loads((RESULTS / "billion.json").read_text(encoding="utf-8"))
STAGES = {
    "calibrate --gradients": "calibrate --gradients",
    "build-emulator": "build-emulator",
    "correct": "correct",
    "evaluate": "evaluate the base and the corrected LoRA",
}


@pytest.fixture(scope="module")
def foreseen() -> dict[str, StageNeeds]:
    """Of the base, the samples and the lengths of the recorded runs."""
    model = build_skeleton(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SHAPES), dtype=torch.bfloat16)
    layers = select_layers(model)
    length = RECORD["max_length"]
    _, groups = inference_and_groups(model, layers, {"input_ids": torch.full((1, length), 5)})
    needs = stage_needs(
        sizes_of(model),
        layers,
        groups,
        tokens=length,
        samples=RECORD["samples"],
        hidden=SHAPES["hidden_size"],
        vocabulary=SHAPES["vocab_size"],
        itemsize=2,
        emulator=0,
        adapter=0,
    )
    return {each.stage: each for each in needs}


@pytest.mark.parametrize("stage", STAGES)
def test_main_memory_is_about_what_was_recorded(stage: str, foreseen: dict[str, StageNeeds]) -> None:
    recorded = next(row for row in RECORD["rows"] if row["stage"] == STAGES[stage])
    assert foreseen[stage].memory == pytest.approx(recorded["peak_rss_bytes"], rel=0.15)


def test_the_statistics_take_the_disk_that_was_recorded(foreseen: dict[str, StageNeeds]) -> None:
    recorded = next(row for row in RECORD["rows"] if row["stage"] == "calibrate --gradients")
    assert foreseen["calibrate --gradients"].disk == pytest.approx(recorded["disk_bytes"], rel=1e-3)


def test_layers_that_read_one_tensor_are_found() -> None:
    model = build_skeleton(transformers.LlamaForCausalLM, pico.config("llama"), dtype=torch.float32)
    layers = select_layers(model)
    _, groups = inference_and_groups(model, layers, {"input_ids": torch.full((1, 8), 5)})
    ends = [[layer.name.rpartition(".")[2] for layer in group] for group in groups]
    assert ends == 3 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_the_smaller_side_is_kept_and_every_expert_counts() -> None:
    wide, narrow = Layer("wide", 30, 10, "linear", False), Layer("narrow", 4, 10, "linear", False)
    experts = Layer("experts", 6, 10, "linear", False, experts=3)
    assert grams_of([[wide], [narrow]], [experts], gradients=False) == [10, 4, 6, 6, 6]
    assert grams_of([[wide], [narrow]], [], gradients=True) == [10, 10, 4, 4]
    assert grams_of([[narrow, narrow]], [], gradients=False) == [4, 4]  # two of the outputs are smaller than the input
