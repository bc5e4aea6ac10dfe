"""inspect of bases and emulators: every parameter is in a layer to factor or in a dense part, with the right reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from emloc_tools.errors import InputError, MismatchError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.inspect import Inspection, inspect
from tests import pico
from tests.conftest import Run
from tests.models.fake_hub import FakeHub, commit_of, serve
from tests.stages.reference import read_json, read_tensors

OMITTED = "left out by --targets or --exclude"


def reasons(found: Inspection) -> dict[str, str]:
    """The reason of every dense part by its name."""
    return {part["name"]: part["reason"] for part in found.dense}


def parameters_of(model: nn.Module) -> int:
    """All parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", list(pico.CLASSES))
def test_every_parameter_of_a_base_is_in_one_place(family: str, tmp_path: Path) -> None:
    model = pico.save_model(tmp_path, family)
    found = inspect(tmp_path)
    assert found.kind == "base"
    assert found.facts["architecture"] == type(model).__name__
    assert found.facts["parameters"] == parameters_of(model)
    in_layers = sum(row["parameters"] for row in found.layers)
    in_parts = sum(part["parameters"] for part in found.dense)
    assert in_layers == found.facts["parameters_in_them"]
    assert in_parts == found.facts["dense_parameters"] == sum(found.facts["dense_by_reason"].values())
    assert in_layers + in_parts == parameters_of(model)
    assert found.facts["stored_bytes"] == sum(tensor.nbytes for tensor in read_tensors(tmp_path).values())


def test_what_would_become_factors_is_what_an_emulator_factors(tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", "gpt2")
    build_emulator(base=str(tmp_path / "base"), ratio=0.2, output=tmp_path / "emulator")
    listed = {row["layer"]: (row["out"], row["in"]) for row in inspect(tmp_path / "base").layers}
    factored = read_json(tmp_path / "emulator" / "emulator.json")["layers"]
    assert listed == {name: (layer["out_features"], layer["in_features"]) for name, layer in factored.items()}


def test_reasons_in_a_language_model(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "qwen3-moe")
    assert reasons(inspect(tmp_path)) == {
        "model.embed_tokens": "embedding",
        "model.layers.*.self_attn.q_norm": "norm",
        "model.layers.*.self_attn.k_norm": "norm",
        "model.layers.*.mlp.gate": "router",
        "model.layers.*.input_layernorm": "norm",
        "model.layers.*.post_attention_layernorm": "norm",
        "model.norm": "norm",
        "lm_head": "output head",
    }


def test_biases_shared_weights_and_what_is_outside_of_blocks(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "bert")
    found = inspect(tmp_path)
    part = {part["name"]: part for part in found.dense}
    biases = part["bert.encoder.layer.*.attention.self.query"]
    assert biases == {"name": biases["name"], "count": 2, "parameters": 64, "reason": "bias of a factored layer"}
    assert part["cls.predictions.transform.dense"]["reason"] == "outside repeated blocks"
    shared = part["cls.predictions.decoder"]
    assert (shared["reason"], shared["parameters"]) == ("its weight is another module's, too", 0)
    assert part["bert.embeddings.word_embeddings"]["parameters"] == pico.VOCABULARY * 32


def save(folder: Path, cls: type[Any], config: Any) -> None:
    """Save a random model."""
    cls(config).save_pretrained(folder)


def test_reasons_in_models_of_images_and_of_other_kinds(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"image_size": 32, "patch_size": 8}
    vision = transformers.SiglipVisionConfig(**small, **image)
    save(tmp_path / "siglip", transformers.SiglipVisionModel, vision)
    found = reasons(inspect(tmp_path / "siglip"))
    assert found["embeddings.patch_embedding"] == "convolution"
    assert found["head.attention.out_proj"] == "not called, or more than a linear layer"
    assert found["head.probe"] == found["head.attention.in_proj_weight"] == "no linear layer"

    mamba = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=1)
    save(tmp_path / "mamba", transformers.MambaForCausalLM, mamba)
    found = reasons(inspect(tmp_path / "mamba"))
    assert found["backbone.layers.*.mixer.A_log"] == "no linear layer"
    assert found["backbone.layers.*.mixer.dt_proj"] == "factors would not be smaller"

    llama4 = {**small, "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 48}
    save(tmp_path / "llama4", transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**llama4))
    found = reasons(inspect(tmp_path / "llama4"))
    assert found["model.layers.*.feed_forward.experts.down_proj"] == "experts in a layout of their own"
    assert found["model.layers.*.feed_forward.router"] == "router"


def test_layers_that_the_options_leave_out_are_dense_for_that_reason(run: Run) -> None:
    plain = inspect(run.base)
    assert OMITTED not in reasons(plain).values()
    found = inspect(run.base, targets="self_attn", exclude="k_proj")
    left_out = {name for name, reason in reasons(found).items() if reason == OMITTED}
    assert left_out == {
        f"model.layers.*.{part}" for part in ("self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert {row["layer"] for row in found.layers} == {
        row["layer"] for row in plain.layers if "self_attn" in row["layer"] and "k_proj" not in row["layer"]
    }
    assert inspect(run.base, targets="lm_head").layers[0]["layer"] == "lm_head"
    with pytest.raises(InputError, match="--targets 'nothing' matches no linear layer"):
        inspect(run.base, targets="nothing")


def test_only_the_headers_of_the_weights_are_read(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    before = inspect(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, path, {"format": "pt"})
    assert inspect(tmp_path) == before
    # Control: a header that does not fit the model is noticed.
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(MismatchError, match=r"model\.norm\.weight is not in the checkpoint"):
        inspect(tmp_path)


def test_of_a_hub_id_no_weights_are_fetched(tmp_path: Path) -> None:
    """In a process of its own, since huggingface_hub reads its settings once."""
    pico.save_model(tmp_path / "base")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "emloc_tools", "inspect", "org/model", "--json"]
    with serve(FakeHub({"org/model": {"main": tmp_path / "base"}})) as hub:
        environment["HF_ENDPOINT"] = hub.url
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, local = json.loads(done.stdout), inspect(tmp_path / "base")
    assert (found["facts"]["base"], found["facts"]["revision"]) == ("org/model", commit_of("main"))
    assert (found["layers"], found["dense"]) == (local.layers, local.dense)
    assert "config.json" in hub.fetched()
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_an_emulator_tells_what_it_holds_dense(run: Run, tmp_path: Path) -> None:
    emulator = tmp_path / "emulator"
    build_emulator(base=str(run.base), calibration=run.calibration, ratio=0.5, exclude="layers.1.mlp", output=emulator)
    found = inspect(emulator)
    left_out = [part for part in found.dense if part["reason"].startswith("not chosen")]
    assert {part["name"]: part["count"] for part in left_out} == {
        f"model.layers.*.mlp.{part}_proj": 1 for part in ("gate", "up", "down")
    }
    stored = read_tensors(emulator)
    factors = {name for name in stored if re.search(r"\.(U|S|Vh)$", name)}
    dense = sum(tensor.numel() for name, tensor in stored.items() if name not in factors) - 1  # and the guard
    assert found.facts["dense_parameters"] == dense == sum(part["parameters"] for part in found.dense)


def test_an_emulator_of_an_unknown_class_is_described_without_its_dense_parts(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(transformers, "LlamaForCausalLM")
    monkeypatch.setattr("emloc_tools.reporting.model_parts.transformers", type("Old", (), {"__version__": "5.0"}))
    found = inspect(run.emulator)
    assert found.facts["dense_parts"] == "unknown here: transformers 5.0 has no model class LlamaForCausalLM"
    assert found.dense == []
    assert len(found.layers) == 21


@pytest.mark.parametrize("option", ["revision", "targets", "exclude"])
def test_options_that_are_of_a_base_are_refused_for_anything_else(option: str, run: Run) -> None:
    with pytest.raises(InputError, match=rf"holds emulator\.json; --{option} says something of a base only"):
        inspect(run.emulator, **{option: "x"})  # type: ignore[arg-type]
