"""refine on a denoiser: the squared error of its prediction falls, and the files stay those of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emloc_tools.stages.correct import correct
from emloc_tools.stages.refine import refine
from tests.diffusion import pico_flux
from tests.diffusion.conftest import Case, calls_in
from tests.stages.reference import read_json

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def corrected(flux: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of random numbers on the emulator's attention, with PEFT's metadata, corrected for the base."""
    from diffusers.training_utils import _collate_lora_metadata

    root = tmp_path_factory.mktemp("refine")
    model = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "proj_mlp"]))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    diffusers.FluxPipeline.save_lora_weights(
        root / "lora",
        transformer_lora_layers=get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    correct(emulator=flux.emulator, adapter=root / "lora", base=flux.base, output=root / "corrected")
    return root / "corrected"


def with_targets(flux: Case, path: Path) -> Path:
    """The recorded inputs, with what the model makes of them and a fixed offset as the target."""
    tensors = load_file(flux.inputs)
    for number, call in enumerate(calls_in(flux.inputs)):
        with torch.no_grad():
            tensors[f"{number}/target"] = flux.model(**call).sample + 0.5
    save_file(tensors, path)
    return path


def error(flux: Case, adapter: Path, data: Path) -> float:
    """The mean squared error over all entries, by the pipeline of diffusers with the LoRA."""
    pipeline = pico_flux.load_pipeline(flux.pipeline)
    pipeline.load_lora_weights(adapter)
    squares, entries = 0.0, 0
    for call in calls_in(data):
        target = call.pop("target")
        with torch.no_grad():
            difference = pipeline.transformer(**call).sample - target
        squares, entries = squares + float(difference.square().sum()), entries + difference.numel()
    return squares / entries


def test_the_error_falls_and_the_first_loss_is_that_before(flux: Case, corrected: Path, tmp_path: Path) -> None:
    data = with_targets(flux, tmp_path / "targets.safetensors")
    calls = len(calls_in(data))
    result = refine(
        base=flux.base, adapter=corrected, data=data, output=tmp_path / "refined", steps=6, samples_per_step=calls
    )
    before, after = error(flux, corrected, data), error(flux, tmp_path / "refined", data)
    assert result.losses[0] == pytest.approx(before, rel=1e-5)
    assert after < result.losses[-1] < 0.9 * before


def test_names_and_metadata_stay(flux: Case, corrected: Path, tmp_path: Path) -> None:
    data = with_targets(flux, tmp_path / "targets.safetensors")
    refine(base=flux.base, adapter=corrected, data=data, output=tmp_path / "refined", steps=1, samples_per_step=1)
    headers = []
    for folder in (corrected, tmp_path / "refined"):
        with safe_open(folder / WEIGHTS, "pt") as file:
            headers.append((list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])))
    assert headers[0] == headers[1]
    report = read_json(tmp_path / "refined" / "emloc.json")
    assert (report["format_version"], report["component"]) == (4, "transformer")
    assert [refinement["data"]["samples"] for refinement in report["refinements"]] == [1]
