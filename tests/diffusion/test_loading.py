"""Emulators of a FluxTransformer2DModel load by its own class, by AutoModel, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from emloc_tools import load_emulator
from emloc_tools.models.lowrank_layers import LowRankLinear
from tests.diffusion.conftest import Case
from tests.diffusion.measures import linears, outputs
from tests.stages.reference import close_to, read_json, read_tensors

OUTSIDE = """
import json, sys
sys.modules["emloc_tools"] = None  # as if it were not installed
import torch
from diffusers import AutoModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
folder, inputs, output = sys.argv[1:]
found = {}
for name, load in (("class", FluxTransformer2DModel.from_pretrained), ("auto", AutoModel.from_pretrained)):
    try:
        load(folder)
        found[name] = "loaded"
    except ValueError as error:
        found[name] = str(error)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
found["type"] = f"{type(model).__module__}.{type(model).__name__}"
with torch.no_grad():
    save_file({"sample": model(**load_file(inputs)).sample}, output)
print(json.dumps(found))
"""


def test_the_class_of_the_base_loads_the_emulator_once_emloc_tools_is_imported(flux: Case) -> None:
    model, info = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator, output_loading_info=True)
    assert type(model) is diffusers.FluxTransformer2DModel
    assert not any(info.values())  # neither the guard nor anything else is missing, unexpected or mismatched
    ranks = read_json(flux.emulator / "config.json")["quantization_config"]["ranks"]
    assert {name: module.rank for name, module in linears(model).items()} == ranks
    tensors, base = read_tensors(flux.emulator), linears(flux.model)
    name = "single_transformer_blocks.1.proj_mlp"
    x = torch.randn(3, 32)
    W = tensors[f"{name}.U"] @ torch.diag(tensors[f"{name}.S"]) @ tensors[f"{name}.Vh"]
    with torch.no_grad():
        found = linears(model)[name](x)
    assert close_to(found, x @ W.T + base[name].bias.detach()) < 1e-5


def test_load_emulator_gives_the_same_model(flux: Case) -> None:
    model = load_emulator(flux.emulator)
    other = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
    assert torch.equal(outputs(model, flux.heldout), outputs(other, flux.heldout))


def test_an_emulator_can_be_cast_and_saved_again(flux: Case, tmp_path: Path) -> None:
    """Training scripts cast their model; diffusers refuses that of quantised ones."""
    model = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
    model.save_pretrained(tmp_path)
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, flux.heldout), outputs(model, flux.heldout))
    model.to("cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_without_emloc_tools_the_class_fails_and_trusted_code_gives_the_same_model(flux: Case, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(flux.heldout[0], tmp_path / "inputs.safetensors")
    files = [str(path) for path in (flux.emulator, tmp_path / "inputs.safetensors", tmp_path / "output.safetensors")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", OUTSIDE, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "Unknown quantization type, got emloc" in found["class"]
    assert "trust_remote_code=True" in found["auto"]
    assert found["type"] == "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel"
    model = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
    assert torch.equal(load_file(files[2])["sample"], outputs(model, flux.heldout[:1])[0])


def test_the_guard_stops_a_loader_that_overlooks_the_method(flux: Case, tmp_path: Path) -> None:
    """Without `quantization_config` diffusers would otherwise leave U, S and Vh and take random weights."""
    config = read_json(flux.emulator / "config.json")
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(flux.emulator / weights)
    with pytest.raises(ValueError, match=r"expected shape torch.Size\(\[\d+, \d+\]\), but got torch.Size\(\[1\]\)"):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)


def test_a_damaged_emulator_is_not_filled_with_random_numbers(flux: Case, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = read_tensors(flux.emulator)
    del tensors["transformer_blocks.0.attn.to_q.S"]
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((flux.emulator / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.to_q.S is not in .*; the emulator is damaged"):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)


def test_importing_emloc_tools_imports_neither_diffusers_nor_torch() -> None:
    code = "import sys, emloc_tools; print({'diffusers', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_low_rank_layers_are_those_of_the_package(flux: Case) -> None:
    modules = linears(load_emulator(flux.emulator)).values()
    assert all(isinstance(module, LowRankLinear) for module in modules)
