"""What is foreseen of a step, against what torch's profiler sees of a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from emloc_tools import load_emulator
from emloc_tools.errors import InputError
from emloc_tools.linalg.allocate import uniform_ranks
from emloc_tools.models.layers import select_layers
from emloc_tools.models.lowrank_modules import factor_layers
from emloc_tools.models.skeleton import build_skeleton
from emloc_tools.planning.step import Training, inference_memory, training_memory
from tests import pico
from tests.conftest import RATIO, Run
from tests.planning.measured import growth, peak_of_inference, peak_of_training

ROUNDING = 2e-4  # small scalars of the loss and of the optimizer's counters
STATE = torch.get_rng_state().nbytes  # of the generator: checkpointing keeps one per block, made below dispatch
CASES = [
    ("llama", torch.float32, True, "adamw"),
    ("llama", torch.bfloat16, False, "adamw"),
    ("llama-tied", torch.float32, False, "sgd"),
    ("gpt2", torch.float32, False, "adafactor"),
    ("qwen3-moe", torch.bfloat16, False, "adamw"),
    ("bert", torch.float32, True, "sgd"),
]


def inputs(length: int = 96) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, pico.VOCABULARY, (2, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def skeleton(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return build_skeleton(getattr(transformers, pico.CLASSES[family]), pico.config(family), dtype=dtype)


def linears(model: Any) -> list[str]:
    return [layer.name for layer in select_layers(model) if layer.experts is None]


@pytest.mark.parametrize(("family", "dtype", "checkpointing", "optimizer"), CASES)
def test_a_step_takes_what_is_foreseen(family: str, dtype: torch.dtype, checkpointing: bool, optimizer: str) -> None:
    model, given = skeleton(family, dtype), inputs()
    targets = linears(model)
    foreseen = training_memory(model, given, Training(4, targets, torch.float32, checkpointing, optimizer)).total
    real = getattr(transformers, pico.CLASSES[family])(pico.config(family)).to(dtype)
    measured = peak_of_training(real, given, targets=targets, checkpointing=checkpointing, optimizer=optimizer)
    unseen = STATE * pico.config(family).num_hidden_layers if checkpointing else 0
    assert foreseen + unseen == pytest.approx(measured, rel=ROUNDING)


def test_a_step_of_an_emulator_takes_what_is_foreseen(run: Run) -> None:
    model, given = skeleton("llama"), inputs()
    targets = linears(model)
    factor_layers(model, uniform_ranks(select_layers(model), RATIO))
    foreseen = training_memory(model, given, Training(4, targets, gradient_checkpointing=False)).total
    loaded = load_emulator(run.emulator)
    assert foreseen == pytest.approx(
        peak_of_training(loaded, given, targets=targets, checkpointing=False), rel=ROUNDING
    )


def test_the_measure_tells_the_settings_apart(run: Run) -> None:
    """The control: what is foreseen for the base, or with checkpointing, is far from an emulator's step without."""
    given, targets = inputs(), linears(skeleton("llama"))
    measured = peak_of_training(load_emulator(run.emulator), given, targets=targets, checkpointing=False)
    of_base = training_memory(skeleton("llama"), given, Training(4, targets, gradient_checkpointing=False)).total
    checkpointed = training_memory(skeleton("llama"), given, Training(4, targets, gradient_checkpointing=True)).total
    assert abs(of_base / measured - 1) > 100 * ROUNDING
    assert checkpointed < 0.7 * measured


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_forward_pass_takes_what_is_foreseen(family: str) -> None:
    given = {name: tensor for name, tensor in inputs().items() if name != "labels"}
    real = getattr(transformers, pico.CLASSES[family])(pico.config(family)).eval()
    assert inference_memory(skeleton(family), given).total == pytest.approx(
        peak_of_inference(real, given), rel=ROUNDING
    )


def test_a_decoder_beside_an_encoder_reads_the_labels_in_a_forward_pass() -> None:
    sizes = {"vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    given = inputs()
    foreseen = inference_memory(
        build_skeleton(transformers.T5ForConditionalGeneration, config, dtype=torch.float32), given
    )
    real = transformers.T5ForConditionalGeneration(config).eval()
    arguments = {**given, "decoder_input_ids": given["labels"]}
    del arguments["labels"]

    def forward() -> None:
        with torch.no_grad():
            real(**arguments, use_cache=True)

    held = sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers(), *arguments.values()))
    assert foreseen.total == pytest.approx(held + growth(forward), rel=1e-3)


def test_the_parts_are_what_they_are_called() -> None:
    model, given = skeleton("llama"), inputs()
    targets = linears(model)
    layers = {layer.name: layer for layer in select_layers(model)}
    adapter = sum(4 * 4 * (layers[name].out_features + layers[name].in_features) for name in targets)
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    adamw, sgd = (
        training_memory(skeleton("llama"), given, Training(4, targets, optimizer=name)) for name in ("adamw", "sgd")
    )
    # The peak is where the loss turns back: the logits, their normalised form, and a gradient of either.
    assert adamw.logits == 3 * given["input_ids"].numel() * pico.VOCABULARY * 4
    assert adamw.weights == sum(held.values())
    assert sgd.training_state == adapter
    counters = 2 * len(targets) * 4  # how many steps AdamW has made, for A and B of every layer
    assert adamw.training_state == 3 * adapter + counters
    assert (adamw.activations, adamw.logits) == (sgd.activations, sgd.logits)
    assert adamw.total == adamw.weights + adamw.training_state + adamw.activations + adamw.logits


def test_gradients_count_as_training_state() -> None:
    """A LoRA so large that the peak is the update: then A and B, their gradients and both moments are there at once."""
    model, given = skeleton("llama"), inputs(2)
    layers, rank = select_layers(model), 512
    adapter = sum(4 * rank * (layer.out_features + layer.in_features) for layer in layers)
    found = training_memory(model, given, Training(rank, [layer.name for layer in layers]))
    largest = 4 * rank * max(max(layer.out_features, layer.in_features) for layer in layers)
    # The update of one parameter makes up to three temporary tensors of its size.
    assert 4 * adapter <= found.training_state <= 4 * adapter + 4 * largest


def test_targets_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="--lora-targets"):
        training_memory(skeleton("llama"), inputs(), Training(4, ["c_attn"]))


def test_a_model_without_checkpointing_is_refused_with_it() -> None:
    model = skeleton("albert")
    with pytest.raises(InputError, match="plan with --no-gradient-checkpointing"):
        training_memory(model, inputs(), Training(4, linears(model)))
