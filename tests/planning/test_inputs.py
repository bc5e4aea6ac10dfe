"""The inputs that a plan is made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.skeleton import build_skeleton, load_config, model_class
from emloc_tools.models.source import Source, open_source
from emloc_tools.planning.inputs import Shape, make_inputs
from emloc_tools.planning.step import Training, training_memory
from tests import pico, pico_vision
from tests.diffusion import pico_flux
from tests.planning.measured import growth, peak_of_training

SIZE = Shape(batch_size=2, length=80, images=2, image_size=(56, 28), resolution=(64, 32))


def opened(folder: Path) -> tuple[nn.Module, Any, Source]:
    source = open_source(str(folder))
    config = load_config(source)
    return build_skeleton(model_class(config, source), config, dtype=torch.float32), config, source


def test_texts_are_of_plain_tokens_and_are_their_own_labels(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    found = make_inputs(*opened(tmp_path), Shape(3, 17))
    assert found["input_ids"].shape == (3, 17)
    assert {0, 1, 2}.isdisjoint(found["input_ids"].unique().tolist())  # padding, beginning and end of a text
    assert torch.equal(found["labels"], found["input_ids"])


@pytest.mark.parametrize("family", ["internvl", "qwen2.5-vl"])
def test_steps_with_images_take_what_is_foreseen(family: str, tmp_path: Path) -> None:
    real = pico_vision.save_model(tmp_path, family)
    model, config, source = opened(tmp_path)
    given = make_inputs(model, config, source, SIZE)
    assert given["input_ids"].shape == (2, 80)
    targets = ["q_proj", "v_proj"]
    foreseen = training_memory(model, given, Training(4, targets, gradient_checkpointing=False)).total
    measured = peak_of_training(real, given, targets=targets, checkpointing=False)
    assert foreseen == pytest.approx(measured, rel=1e-3)
    without = make_inputs(opened(tmp_path)[0], config, source, Shape(2, 80))
    of_text = training_memory(opened(tmp_path)[0], without, Training(4, targets, gradient_checkpointing=False)).total
    assert of_text < 0.95 * measured  # the control: the images take something


def test_without_a_processor_tiles_become_as_many_tokens_as_the_processor_makes(tmp_path: Path) -> None:
    pico_vision.save_model(tmp_path, "internvl")
    square = Shape(2, 80, images=2, image_size=(pico_vision.SIDE, pico_vision.SIDE))
    with_processor = make_inputs(*opened(tmp_path), square)
    (tmp_path / "preprocessor_config.json").unlink()
    without = make_inputs(*opened(tmp_path), square)
    image = pico_vision.token("internvl", "context_image_token")
    assert (with_processor["input_ids"] == image).sum() == (without["input_ids"] == image).sum() > 0
    assert with_processor["pixel_values"].shape == without["pixel_values"].shape


def test_images_that_do_not_fit_into_the_text_are_refused(tmp_path: Path) -> None:
    pico_vision.save_model(tmp_path, "internvl")
    with pytest.raises(InputError, match=r"--images 9 and the text around them take .* more than --sequence-length 20"):
        make_inputs(*opened(tmp_path), Shape(1, 20, images=9))


def test_images_for_a_model_of_texts_are_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    with pytest.raises(InputError, match="LlamaForCausalLM reads text alone"):
        make_inputs(*opened(tmp_path), SIZE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_a_denoiser_takes_what_is_foreseen(checkpointing: bool, tmp_path: Path) -> None:
    from peft import LoraConfig

    real = pico_flux.save_flux(tmp_path)
    model, config, source = opened(tmp_path)
    given = make_inputs(model, config, source, SIZE)
    assert given["hidden_states"].shape == (2, 4 * 2, 4)  # patches of 16 x 16 pixels
    training = Training(4, ["to_q", "to_v"], gradient_checkpointing=checkpointing, optimizer="sgd")
    foreseen = training_memory(model, given, training).total
    real.requires_grad_(False)
    real.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    real.train()
    if checkpointing:
        real.enable_gradient_checkpointing()
    optimizer = torch.optim.SGD([p for p in real.parameters() if p.requires_grad], lr=1e-3, foreach=False)

    def loss() -> torch.Tensor:
        predicted = real(**given)[0].float()
        return torch.nn.functional.mse_loss(predicted, torch.zeros_like(predicted))

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    held = sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers(), *given.values()))
    blocks = len(real.transformer_blocks) + len(real.single_transformer_blocks)
    # States of the generator, made below dispatch: one per block, and one while a block runs again.
    unseen = (blocks + 1) * torch.get_rng_state().nbytes if checkpointing else 0
    assert foreseen + unseen == pytest.approx(held + growth(step), rel=1e-3)


def test_a_resolution_between_patches_is_refused(tmp_path: Path) -> None:
    pico_flux.save_flux(tmp_path)
    with pytest.raises(InputError, match="--resolution 100x64: both must be multiples of 16"):
        make_inputs(*opened(tmp_path), Shape(resolution=(100, 64)))


def test_of_data_the_largest_batch_counts(tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base")
    texts = [{"text": "a" * length} for length in (3, 50, 7)]
    data = pico.write_jsonl(tmp_path / "train.jsonl", texts)
    found = make_inputs(*opened(tmp_path / "base"), Shape(1, 200, data=data))
    longest = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")("a" * 50)["input_ids"]
    assert found["input_ids"].tolist() == [longest]
    assert torch.equal(found["labels"], found["input_ids"])


def test_ready_inputs_are_taken_without_their_targets(tmp_path: Path) -> None:
    pico_flux.save_flux(tmp_path / "base")
    given = make_inputs(*opened(tmp_path / "base"), SIZE)
    ready = {f"0/{name}": tensor for name, tensor in given.items()}
    save_file({**ready, "0/target": torch.zeros(2, 8, 4)}, tmp_path / "inputs.safetensors")
    found = make_inputs(*opened(tmp_path / "base"), Shape(data=tmp_path / "inputs.safetensors"))
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in given.items()}


def test_a_model_of_unknown_inputs_asks_for_data(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,), "num_conv_pos_embedding_groups": 2}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **convolutions))
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="takes input_values, of which the shape is not known here; give --data"):
        make_inputs(*opened(tmp_path), Shape())


UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
OF_SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
SD3: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 96,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SD3Transformer2DModel", SD3),
        ("UNet2DConditionModel", UNET),
        ("UNet2DConditionModel", {**UNET, **OF_SDXL}),
    ],
    ids=["SD3", "Stable Diffusion", "SDXL"],
)
def test_denoisers_take_the_inputs_and_give_a_picture_of_that_size(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    real = getattr(diffusers, name)(**settings).eval()
    real.save_pretrained(tmp_path)
    given = make_inputs(*opened(tmp_path), Shape(2, 20, resolution=(64, 32)))
    with torch.no_grad():
        assert real(**given)[0].shape == (2, 4, 64 // 8, 32 // 8)
