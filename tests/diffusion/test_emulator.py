"""Emulators of a FluxTransformer2DModel: what they are made from, and how good they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from emloc_tools import load_emulator
from emloc_tools.files.calibration import Calibration
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.truncate import truncate
from tests.diffusion import pico_flux
from tests.diffusion.conftest import Case, calls_in
from tests.diffusion.measures import linears, outputs
from tests.stages.reference import close_to, read_json, read_tensors, tensor_hash


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
    """The folder of the pipeline and that of the transformer mean the same model, whose weights are read once."""
    result = calibrate(base=f"{flux.base}/transformer", data=flux.inputs, output=tmp_path / "inner", device="cpu")
    assert result.bytes_read == sum(tensor.nbytes for tensor in read_tensors(flux.pipeline / "transformer").values())
    ours, theirs = (read_tensors(folder) for folder in (tmp_path / "inner", flux.calibration))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
