"""A unet as that of SDXL, which takes a dictionary of embeddings: recorded, calibrated, and exact at full rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emloc_tools import record_inputs
from emloc_tools.errors import InputError
from emloc_tools.files.calibration import Calibration
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from tests.stages.reference import close_to

UNET: dict[str, Any] = {
    **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [16, 32]},
    **{"norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 4},
    **{"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]},
    **{"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 68},
}


def calls() -> list[dict[str, Any]]:
    """What a pipeline of SDXL gives its unet at two timesteps."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [
        {
            "sample": draw(2, 4, 8, 8),
            "timestep": torch.tensor(time),
            "encoder_hidden_states": draw(2, 7, 24),
            "added_cond_kwargs": {"text_embeds": draw(2, 20), "time_ids": draw(2, 6)},
            "timestep_cond": None,
            "cross_attention_kwargs": None,
            "return_dict": False,
        }
        for time in (801, 1)
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Path]:
    """The base's folder, the base in memory, and its recorded calls."""
    root = tmp_path_factory.mktemp("unet")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**UNET).eval()
    model.save_pretrained(root / "base")
    with record_inputs(model, root / "inputs.safetensors", probe=True), torch.no_grad():
        for call in calls():
            model(**call)
    return root / "base", model, root / "inputs.safetensors"


def test_the_dictionary_is_recorded_by_its_keys_and_reaches_the_model_again(
    recorded: tuple[Path, nn.Module, Path], tmp_path: Path
) -> None:
    base, model, data = recorded
    stored = load_file(data)
    for number, call in enumerate(calls()):
        for key, tensor in call["added_cond_kwargs"].items():
            assert torch.equal(stored[f"{number}/added_cond_kwargs.{key}"], tensor)
    calibrate(base=str(base), data=data, gradients=True, output=tmp_path / "calibration", device="cpu")
    calibration = Calibration(tmp_path / "calibration")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(args[0]))
    with torch.no_grad():
        for call in calls():
            model(**call)
        for call in calls():  # the control: other embeddings
            call["added_cond_kwargs"]["text_embeds"] += 1
            model(**call)
    handle.remove()
    right, wrong = (torch.cat([x.reshape(-1, x.shape[-1]) for x in part]).double() for part in (found[:2], found[2:]))
    gram, module = calibration.gram(name), model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    W = module.weight.detach().double()
    right, wrong = (X if gram.side == "input" else X @ W.T for X in (right, wrong))
    assert close_to(gram.matrix, right.T @ right) < 1e-5
    assert close_to(gram.matrix, wrong.T @ wrong) > 1e-3
    assert calibration.gradient(name) is not None
    calibration.close()


def test_at_full_rank_the_emulator_computes_what_the_base_does(
    recorded: tuple[Path, nn.Module, Path], tmp_path: Path
) -> None:
    base, model, data = recorded
    calibrate(base=str(base), data=data, output=tmp_path / "calibration", device="cpu")
    calibration = Calibration(tmp_path / "calibration")
    ranks = {name: min(each.out_features, each.in_features) for name, each in calibration.manifest.layers.items()}
    calibration.close()
    assert any(".resnets." in name for name in ranks)  # the embeddings of time go into these
    for name, rank in (("full", ranks), ("least", dict.fromkeys(ranks, 1))):
        build_emulator(base=str(base), calibration=tmp_path / "calibration", ranks=rank, output=tmp_path / name)
    with torch.no_grad():
        expected = torch.cat([model(**call)[0] for call in calls()])
        errors = []
        for name in ("full", "least"):
            emulator = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / name)
            errors.append(close_to(torch.cat([emulator(**call)[0] for call in calls()]), expected))
    assert errors[0] < 1e-5
    assert errors[1] > 1e-2  # the control


def test_an_argument_is_a_tensor_or_a_dictionary(recorded: tuple[Path, nn.Module, Path], tmp_path: Path) -> None:
    save_file({**load_file(recorded[2]), "1/added_cond_kwargs": torch.ones(1)}, tmp_path / "inputs.safetensors")
    with pytest.raises(
        InputError, match=r"1/added_cond_kwargs and 1/added_cond_kwargs\.\w+; an argument is a tensor or"
    ):
        calibrate(base=str(recorded[0]), data=tmp_path / "inputs.safetensors", output=tmp_path / "out", device="cpu")


def test_a_key_that_the_model_misses_is_named(recorded: tuple[Path, nn.Module, Path], tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(recorded[2]).items() if not name.endswith("text_embeds")}
    save_file(tensors, tmp_path / "inputs.safetensors")
    with pytest.raises(InputError, match=r"UNet2DConditionModel cannot run on the inputs .*added_cond_kwargs.time_ids"):
        calibrate(base=str(recorded[0]), data=tmp_path / "inputs.safetensors", output=tmp_path / "out", device="cpu")
