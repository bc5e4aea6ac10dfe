"""A LoRA trained on an emulator as DreamBooth scripts do, corrected, and loaded into the base's pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from emloc_tools.cli import main
from emloc_tools.errors import FormatError, MismatchError, UnsupportedError
from emloc_tools.files.diffusers_lora import DiffusersLora
from emloc_tools.stages.correct import correct
from emloc_tools.stages.merge import merge
from tests.diffusion import pico_flux
from tests.diffusion.conftest import Case, calls_in
from tests.diffusion.measures import linears, outputs
from tests.stages.reference import close_to, read_json, read_tensors

RANK, ALPHA = 16, 24
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "proj_mlp", "net.2", "norm.linear"]
WEIGHTS = "pytorch_lora_weights.safetensors"


def train(model: Any, calls: list[dict[str, torch.Tensor]], steps: int = 30) -> None:
    """A flow-matching loop: the velocity from fixed latents to noise at random times, with AdamW."""
    generator = torch.Generator().manual_seed(3)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        call = dict(calls[step % len(calls)])
        latents = 2.0 + torch.randn(call["hidden_states"].shape, generator=torch.Generator().manual_seed(step % 3))
        noise, t = torch.randn(latents.shape, generator=generator), torch.rand(1, generator=generator)
        call |= {"hidden_states": (1 - t) * latents + t * noise, "timestep": t}
        loss = F.mse_loss(model(**call).sample, noise - latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@dataclass(frozen=True)
class Trained:
    """A LoRA in the file of diffusers, the emulator with it in memory, and the corrected one by the command."""

    folder: Path
    model: Any
    corrected: Path


@pytest.fixture(scope="module")
def trained(flux: Case, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Saved with PEFT's metadata, as DreamBooth scripts save it."""
    from diffusers.training_utils import _collate_lora_metadata

    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    train(model, calls_in(flux.inputs))
    diffusers.FluxPipeline.save_lora_weights(
        root / "lora",
        transformer_lora_layers=get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    words = ["correct", "--emulator", flux.emulator, "--adapter", root / "lora", "--base", flux.base]
    done = CliRunner().invoke(main, [*map(str, words), "--clamp", "none", "--output", str(root / "corrected")])
    assert done.exit_code == 0, done.output
    return Trained(root / "lora", model, root / "corrected")


def transformer_pairs(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by module, float64."""
    tensors = load_file(folder / WEIGHTS)
    names = [name for name in tensors if name.startswith("transformer.") and name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight"): (
            tensors[name].double(),
            tensors[name.replace("lora_A", "lora_B")].double(),
        )
        for name in names
    }


def emulated(folder: Path, name: str) -> torch.Tensor:
    """W_E of a layer, float64."""
    tensors = {key: tensor.double() for key, tensor in read_tensors(folder).items()}
    return tensors[f"{name}.U"] @ torch.diag(tensors[f"{name}.S"]) @ tensors[f"{name}.Vh"]


def test_the_corrected_pairs_are_exact_on_the_rows_of_a(flux: Case, trained: Trained) -> None:
    """For x in the row space of A: (W + s B'' A') x = (W_E + s B A) x, of every pair."""
    before, after = transformer_pairs(trained.folder), transformer_pairs(trained.corrected)
    assert set(before) == set(after)
    assert len(before) > 20
    scaling = ALPHA / RANK
    for name, (A, B) in before.items():
        W = linears(flux.model)[name].weight.detach().double()
        A_new, B_new = after[name]
        wanted = (emulated(flux.emulator, name) + scaling * B @ A) @ A.T
        assert close_to((W + scaling * B_new @ A_new) @ A.T, wanted) < 1e-4
        assert close_to((W + scaling * B @ A) @ A.T, wanted) > 1e-2  # the control: as it was trained


def test_the_corrected_lora_loads_into_the_pipeline_and_fuses(flux: Case, trained: Trained) -> None:
    """With its scaling from the metadata; the outputs are those of W + s B'' A'."""
    pipeline = pico_flux.load_pipeline(flux.pipeline)
    pipeline.load_lora_weights(trained.corrected)
    loaded = outputs(pipeline.transformer, flux.heldout)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = outputs(pipeline.transformer, flux.heldout)
    reference = diffusers.FluxTransformer2DModel.from_pretrained(flux.pipeline / "transformer")
    with torch.no_grad():
        for name, (A, B) in transformer_pairs(trained.corrected).items():
            linears(reference)[name].weight += (ALPHA / RANK * B @ A).float()
    expected = outputs(reference, flux.heldout)
    assert close_to(loaded, expected) < 1e-5
    assert close_to(fused, expected) < 1e-5
    assert close_to(outputs(flux.model, flux.heldout), expected) > 1e-2  # the control: the LoRA does something


def test_correction_lowers_the_error_of_the_transfer(flux: Case, trained: Trained) -> None:
    """How far the base with the LoRA is from the emulator with it, on held-out inputs: what was trained."""
    wanted = outputs(trained.model, flux.heldout)
    errors = {}
    for name, folder in (("uncorrected", trained.folder), ("corrected", trained.corrected)):
        base = diffusers.FluxTransformer2DModel.from_pretrained(flux.pipeline / "transformer")
        base.load_lora_adapter(folder / WEIGHTS, use_safetensors=True)
        errors[name] = close_to(outputs(base, flux.heldout), wanted)
    # What remains lies outside the rows of A, where no LoRA of this rank can act.
    assert errors["corrected"] < 0.92 * errors["uncorrected"], errors


def test_text_encoders_and_metadata_pass_through(flux: Case, trained: Trained, tmp_path: Path) -> None:
    """A file with the LoRA of a text encoder, too; to load it, transformers asks for a later PEFT than 0.21."""
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    others = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)}
    with safe_open(trained.folder / WEIGHTS, "pt") as file:
        header = file.metadata()
    before = json.loads(header["lora_adapter_metadata"]) | {"text_encoder.r": 2, "text_encoder.lora_alpha": 4}
    given = load_file(trained.folder / WEIGHTS) | others
    (tmp_path / "lora").mkdir()
    save_file(given, tmp_path / "lora" / WEIGHTS, metadata={**header, "lora_adapter_metadata": json.dumps(before)})
    correct(emulator=flux.emulator, adapter=tmp_path / "lora", base=flux.base, output=tmp_path / "corrected")
    stored = load_file(tmp_path / "corrected" / WEIGHTS)
    assert {name for name in given if torch.equal(given[name], stored[name])} == set(others)
    report = read_json(tmp_path / "corrected" / "emloc.json")
    assert (report["format_version"], report["component"]) == (3, "transformer")
    assert set(report["unchanged"]) == set(others)
    with safe_open(tmp_path / "corrected" / WEIGHTS, "pt") as file:
        header = file.metadata()
    after = json.loads(header["lora_adapter_metadata"])
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {f"transformer.{key}" for key in ("base_model_name_or_path", "inference_mode", "revision")}
    assert after["transformer.base_model_name_or_path"] == flux.base
    assert json.loads(header["emloc"]) == {"corrected": True, "format_version": 3}


def test_a_corrected_lora_is_not_corrected_again(flux: Case, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="is corrected already"):
        correct(emulator=flux.emulator, adapter=trained.corrected, base=flux.base, output=tmp_path / "out")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / WEIGHTS).write_bytes((trained.corrected / WEIGHTS).read_bytes())
    with pytest.raises(FormatError, match=r"marks a corrected adapter, but emloc.json is gone"):
        correct(emulator=flux.emulator, adapter=tmp_path / "bare", base=flux.base, output=tmp_path / "out")


def test_another_base_is_refused(flux: Case, trained: Trained, tmp_path: Path) -> None:
    pico_flux.save_flux(tmp_path / "other", seed=9)
    with pytest.raises(MismatchError, match="is not the weight that the emulator"):
        correct(emulator=flux.emulator, adapter=trained.folder, base=str(tmp_path / "other"), output=tmp_path / "out")


@pytest.mark.parametrize("alpha", [None, 2.0], ids=["no alpha", "alpha tensors"])
def test_without_metadata_the_scaling_is_that_of_diffusers(
    flux: Case, trained: Trained, tmp_path: Path, alpha: float | None
) -> None:
    """Alpha from tensors, else equal to the rank; what is corrected and what a pipeline computes must agree on it."""
    pairs = transformer_pairs(trained.folder)
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors |= {f"transformer.{name}.lora_A.weight": A.float(), f"transformer.{name}.lora_B.weight": B.float()}
        if alpha is not None:
            tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / WEIGHTS)
    corrected = tmp_path / "corrected"
    correct(emulator=flux.emulator, adapter=tmp_path / "lora", base=flux.base, clamp=None, output=corrected)
    pipeline = pico_flux.load_pipeline(flux.pipeline)
    pipeline.load_lora_weights(corrected)
    scaling = 1.0 if alpha is None else alpha / RANK
    for name, module in pipeline.transformer.named_modules():
        if name in pairs:
            A, B = pairs[name]
            update = module.get_delta_weight("default_0").detach().double()
            W = linears(flux.model)[name].weight.detach().double()
            wanted = (emulated(flux.emulator, name) + scaling * B @ A) @ A.T
            assert close_to((W + update) @ A.T, wanted) < 1e-4
    assert all(torch.equal(tensors[name], load_file(corrected / WEIGHTS)[name]) for name in tensors if "alpha" in name)


def test_gradient_checkpointing_gives_the_same_gradients(flux: Case, trained: Trained) -> None:
    """What training scripts switch on to save memory."""
    call, gradients = flux.heldout[0], []
    for checkpointing in (False, True):
        model = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
        model.load_lora_adapter(trained.folder / WEIGHTS, use_safetensors=True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(**call).sample.square().sum().backward()
        named = model.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named if "lora_" in name})
    assert all(tensor is not None and tensor.any() for tensor in gradients[0].values())
    assert all(close_to(gradients[1][name], tensor) < 1e-5 for name, tensor in gradients[0].items())


def test_merging_into_the_emulator_fails(flux: Case, trained: Trained) -> None:
    with pytest.raises(RuntimeError, match="low-rank"):
        trained.model.fuse_lora()


def test_losses_of_held_out_data_are_refused(flux: Case, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="FluxTransformer2DModel does not predict the next token"):
        correct(
            emulator=flux.emulator,
            adapter=trained.folder,
            base=flux.base,
            data=flux.inputs,
            output=tmp_path / "out",
        )


def test_inspect_shows_the_pairs(trained: Trained) -> None:
    done = CliRunner().invoke(main, ["inspect", "--json", str(trained.corrected)])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["facts"]["corrected"] is True
    assert {row["layer"]: (row["rank"], row["scaling"]) for row in shown["layers"]} == dict.fromkeys(
        transformer_pairs(trained.folder), (RANK, ALPHA / RANK)
    )


def test_dora_is_told_without_metadata_too(flux: Case, trained: Trained, tmp_path: Path) -> None:
    tensors = load_file(trained.folder / WEIGHTS)
    module = "transformer.transformer_blocks.0.attn.to_q"
    save_file({**tensors, f"{module}.lora_magnitude_vector": torch.ones(32)}, tmp_path / WEIGHTS)
    with pytest.raises(UnsupportedError, match="trained with use_dora"):
        correct(emulator=flux.emulator, adapter=tmp_path, base=flux.base, output=tmp_path / "out")
    lora = DiffusersLora(trained.folder)  # control: the same tensors without it
    assert not lora.config["use_dora"]
    lora.close()


def test_merge_writes_the_transformer_that_the_pipeline_fuses(flux: Case, trained: Trained, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["merge", "--base", flux.base, "--adapter", str(trained.corrected), "--output", str(tmp_path / "merged")]
    )
    assert done.exit_code == 0, done.output
    merged = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "merged")
    pipeline = pico_flux.load_pipeline(flux.pipeline)
    pipeline.load_lora_weights(trained.corrected)
    pipeline.fuse_lora()
    expected = outputs(pipeline.transformer, flux.heldout)
    assert close_to(outputs(merged, flux.heldout), expected) < 1e-5
    assert close_to(outputs(flux.model, flux.heldout), expected) > 1e-2  # the control
    assert (tmp_path / "merged" / "config.json").read_bytes() == (
        flux.pipeline / "transformer" / "config.json"
    ).read_bytes()
    with pytest.raises(MismatchError, match=r"has .* in its weights already"):
        merge(base=str(tmp_path / "merged"), adapter=trained.corrected, output=tmp_path / "twice")


def test_merge_refuses_what_is_no_part_of_the_transformer(flux: Case, trained: Trained, tmp_path: Path) -> None:
    tensors = load_file(trained.folder / WEIGHTS)
    others = {f"text_encoder.layer.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors | others, tmp_path / WEIGHTS)
    with pytest.raises((MismatchError, UnsupportedError), match="text_encoder"):
        merge(base=flux.base, adapter=tmp_path, output=tmp_path / "out")


def test_the_command_shows_what_was_done_and_how_to_go_on(flux: Case, trained: Trained, tmp_path: Path) -> None:
    words = ["correct", "--emulator", flux.emulator, "--adapter", trained.folder, "--base", flux.base]
    done = CliRunner().invoke(main, [*map(str, words), "--output", str(tmp_path / "corrected")])
    assert done.exit_code == 0, done.output
    assert f'pipeline.load_lora_weights("{tmp_path}/corrected")' in done.stdout
    assert f"{len(transformer_pairs(trained.folder))} LoRA pairs" in done.stdout


def test_a_pipeline_with_the_emulator_takes_the_lora(flux: Case, tmp_path: Path) -> None:
    """Training scripts end so. diffusers looks for the name of every adapted layer's weight in the state dictionary."""
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
    torch.manual_seed(1)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    diffusers.FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(transformer))
    expected = outputs(transformer, flux.heldout)
    transformer.disable_adapters()
    without = outputs(transformer, flux.heldout)
    light = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
    pipeline = diffusers.FluxPipeline.from_pretrained(flux.pipeline, transformer=light)
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(outputs(pipeline.transformer, flux.heldout), expected)
    assert not torch.equal(without, expected)


def test_the_state_of_an_emulator_goes_back_into_it(flux: Case) -> None:
    """It holds the guard, as the emulator's file does; the guard is no weight to be loaded."""
    first, second = (diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator) for _ in range(2))
    state = first.state_dict()
    assert state["single_transformer_blocks.0.attn.to_k.weight"].shape == (1,)
    for parameter in second.parameters():
        parameter.data.zero_()
    second.load_state_dict(state, strict=True)
    assert torch.equal(outputs(second, flux.heldout), outputs(first, flux.heldout))
