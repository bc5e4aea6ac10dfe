"""Emulators of a FluxTransformer2DModel: what they are made from, how good they are, and how they load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from emloc_tools import load_emulator
from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.calibration import Calibration
from emloc_tools.models.lowrank_modules import LowRankLinear
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.truncate import truncate
from tests import pico
from tests.diffusion import pico_flux
from tests.diffusion.conftest import Case, calls_in
from tests.stages.reference import close_to, read_json, read_tensors, tensor_hash

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


def outputs(model: nn.Module, calls: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(**call).sample for call in calls])


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear in the two lists of blocks."""
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)}


def test_streamed_grams_are_those_of_the_model_in_memory(flux: Case) -> None:
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            X = args[0].reshape(-1, args[0].shape[-1]).double()
            Y = X @ module.weight.detach().double().T
            kept = X if side[name] == "input" else Y
            sums[name] = sums.get(name, torch.zeros(())) + kept.T @ kept
            tokens[name] = tokens.get(name, 0) + len(X)

        return see

    calibration = Calibration(flux.calibration)
    side = {name: calibration.gram(name).side for name in calibration.manifest.layers}
    modules = linears(flux.model)
    assert set(side) == set(modules)
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    outputs(flux.model, calls_in(flux.inputs))
    for handle in handles:
        handle.remove()
    for name in modules:
        gram = calibration.gram(name)
        assert gram.tokens == tokens[name]
        assert close_to(gram.matrix, sums[name]) < 1e-5
    calibration.close()
    other = "transformer_blocks.1.attn.to_q"  # control: another layer's Gram is not close
    assert close_to(sums["transformer_blocks.0.attn.to_q"], sums[other]) > 1e-2


def test_the_manifests_name_the_pipeline_the_class_and_the_library(flux: Case) -> None:
    for folder, file in ((flux.calibration, "calibration.json"), (flux.emulator, "emulator.json")):
        manifest = read_json(folder / file)
        assert manifest["base"] == {"id": flux.base, "revision": None, "architecture": "FluxTransformer2DModel"}
        assert manifest["made_by"]["libraries"]["diffusers"] == diffusers.__version__
    assert manifest["format_version"] == 4
    stored = read_tensors(flux.pipeline / "transformer")
    for name, record in manifest["layers"].items():
        assert record["weight_hash"] == tensor_hash(stored[f"{name}.weight"])


def test_config_and_dense_tensors_are_the_bases_own(flux: Case) -> None:
    config, base = (read_json(folder / "config.json") for folder in (flux.emulator, flux.pipeline / "transformer"))
    assert {key: config[key] for key in base} == base
    assert set(config) - set(base) == {"quantization_config", "auto_map"}
    stored, original = read_tensors(flux.emulator), read_tensors(flux.pipeline / "transformer")
    factored = set(config["quantization_config"]["ranks"])
    dense = [name for name in original if name.removesuffix(".weight") not in factored]
    assert len(dense) > len(factored)  # biases, norms, embeddings, the last projection
    assert all(torch.equal(stored[name], original[name]) for name in dense)


def test_calibration_lowers_the_error_on_held_out_inputs(flux: Case) -> None:
    """Against the plain SVD of the same size, in every held-out call."""
    expected = outputs(flux.model, flux.heldout)
    errors = {}
    for name, folder in (("calibrated", flux.emulator), ("plain", flux.plain)):
        found = outputs(diffusers.FluxTransformer2DModel.from_pretrained(folder), flux.heldout)
        errors[name] = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    ranks = [
        read_json(folder / "config.json")["quantization_config"]["ranks"] for folder in (flux.emulator, flux.plain)
    ]
    assert ranks[0] == ranks[1]
    assert (errors["calibrated"] < 0.5 * errors["plain"]).all(), errors


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


def test_shards_and_bfloat16_pass_through_the_whole_way(tmp_path: Path) -> None:
    """A base of several shards in bf16; at full rank the emulator computes what the base does."""
    model = pico_flux.save_flux(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("*-of-*.safetensors"))) > 1
    full = {name: min(module.weight.shape) for name, module in linears(model).items()}
    base = str(tmp_path / "base")
    build_emulator(base=base, ranks=full, output=tmp_path / "full", max_shard_size=100_000)
    assert len(list((tmp_path / "full").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    emulator = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in emulator.parameters()} == {torch.bfloat16}
    torch.manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
    }
    call = {name: tensor.bfloat16() for name, tensor in call.items()}
    call |= {"img_ids": torch.arange(18.0).reshape(6, 3), "txt_ids": torch.zeros(5, 3)}
    assert close_to(outputs(emulator, [call]), outputs(model, [call])) < 0.02  # bf16 has 8 bits
    build_emulator(base=base, ranks=dict.fromkeys(full, 1), output=tmp_path / "least")
    emulator = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "least", dtype=torch.bfloat16)
    assert close_to(outputs(emulator, [call]), outputs(model, [call])) > 0.05  # the control


def test_truncate_equals_a_new_build_of_that_size(flux: Case, tmp_path: Path) -> None:
    truncate(emulator=flux.emulator, ratio=0.2, output=tmp_path / "truncated")
    build_emulator(base=flux.base, calibration=flux.calibration, ratio=0.2, output=tmp_path / "built")
    models = [diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / name) for name in ("truncated", "built")]
    small, built = (outputs(model, flux.heldout) for model in models)
    assert close_to(small, built) < 1e-4
    assert close_to(small, outputs(load_emulator(flux.emulator), flux.heldout)) > 1e-2  # the control


def test_the_transformer_is_found_in_its_pipeline(flux: Case, tmp_path: Path) -> None:
    """The folder of the pipeline and that of the transformer mean the same model."""
    calibrate(base=f"{flux.base}/transformer", data=flux.inputs, output=tmp_path / "inner", device="cpu")
    ours, theirs = (read_tensors(folder) for folder in (tmp_path / "inner", flux.calibration))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pipeline_of_several_denoisers_asks_for_one(flux: Case, tmp_path: Path) -> None:
    index = read_json(flux.pipeline / "model_index.json")
    index["transformer_2"] = index["transformer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"is a pipeline with transformer, transformer_2; name one .*{tmp_path}/tra"):
        calibrate(base=str(tmp_path), data=flux.inputs, output=tmp_path / "out")
    del index["transformer"], index["transformer_2"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"is a pipeline of scheduler, text_encoder, .*; name the model itself"):
        calibrate(base=str(tmp_path), data=flux.inputs, output=tmp_path / "out")


def test_an_emulator_is_no_base(flux: Case, tmp_path: Path) -> None:
    """Also where its manifest, by which others are told, is gone."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).symlink_to(flux.emulator / name)
    with pytest.raises(InputError, match="is an emulator made by emloc-tools; give the model"):
        calibrate(base=str(tmp_path), data=flux.inputs, output=tmp_path / "out")


def test_texts_are_refused_with_the_command_that_makes_inputs(flux: Case, tmp_path: Path) -> None:
    texts = pico.save_texts(tmp_path / "texts.jsonl")
    with pytest.raises(InputError, match=r"FluxTransformer2DModel of diffusers reads no texts; .* record-inputs"):
        calibrate(base=flux.base, data=texts, output=tmp_path / "out")


def test_a_quantised_base_and_an_unknown_class_are_refused(flux: Case, tmp_path: Path) -> None:
    config = read_json(flux.pipeline / "transformer" / "config.json")
    cases = {
        "is quantised; use the model's full-precision": {"quantization_config": {"quant_method": "bitsandbytes"}},
        "has no model class NoTransformer": {"_class_name": "NoTransformer"},
        "has no model class FluxPipeline": {"_class_name": "FluxPipeline"},
    }
    for message, change in cases.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UnsupportedError, match=message):
            calibrate(base=str(tmp_path), data=flux.inputs, output=tmp_path / "out")


def test_without_diffusers_a_line_names_the_extra(flux: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = r"is a FluxTransformer2DModel of diffusers, which needs the extra `diffusers`: .*emloc-tools\[diffusers\]"
    with pytest.raises(UnsupportedError, match=message):
        calibrate(base=flux.base, data=flux.inputs, output=tmp_path / "out")


def test_importing_emloc_tools_imports_neither_diffusers_nor_torch() -> None:
    code = "import sys, emloc_tools; print({'diffusers', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_low_rank_layers_are_those_of_the_package(flux: Case) -> None:
    modules = linears(load_emulator(flux.emulator)).values()
    assert all(isinstance(module, LowRankLinear) for module in modules)
