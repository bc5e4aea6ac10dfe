"""verify where names differ by more than wrappers: models that read images and were renamed, and diffusion models."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emloc_tools.stages.verify import verify
from tests import pico, pico_vision
from tests.adapters import subjects
from tests.adapters.subjects import CONFIG, PREFIX, WEIGHTS

TARGETS = r".*(q_proj|fc1)"


def older_llava(name: str) -> str:
    """The names of transformers 4.51 and before."""
    name = name.replace(f"{PREFIX}model.language_model.", f"{PREFIX}language_model.model.")
    return name.replace(f"{PREFIX}model.vision_tower.", f"{PREFIX}vision_tower.vision_model.")


def older_qwen(name: str) -> str:
    name = name.replace(f"{PREFIX}model.language_model.", f"{PREFIX}model.")
    return name.replace(f"{PREFIX}model.visual.", f"{PREFIX}visual.")


def older_internvl(name: str) -> str:
    name = name.replace(f"{PREFIX}model.language_model.", f"{PREFIX}language_model.model.")
    return name.replace(f"{PREFIX}model.vision_tower.", f"{PREFIX}vision_tower.")


OLDER: dict[str, Callable[[str], str]] = {"llava": older_llava, "internvl": older_internvl, "qwen2.5-vl": older_qwen}


def vision_adapter(root: Path, family: str) -> tuple[Path, Any]:
    """A base that reads images, and a LoRA on its language model (and LLaVA's tower)."""
    model = pico_vision.save_model(root / "base", family)
    subjects.train(model, root / "base", root / "adapter", target_modules=TARGETS, task_type=None)
    return root / "adapter", subjects.fresh(model, root / "base")


def by_peft(model: Any, base: Path, adapter: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What PEFT adds to each weight, and its warnings of missing keys."""
    found, missing = subjects.loaded(subjects.Subject(base, model, adapter), adapter)
    return subjects.deltas(found), missing


@pytest.mark.parametrize("family", OLDER)
def test_names_from_before_transformers_5_become_those_of_the_base(tmp_path: Path, family: str) -> None:
    adapter, model = vision_adapter(tmp_path, family)
    older = subjects.changed(adapter, tmp_path / "older", OLDER[family])
    stored = load_file(older / WEIGHTS)
    assert not set(stored) & set(load_file(adapter / WEIGHTS))
    result = verify(adapter=older, base=str(tmp_path / "base"))
    assert f"{len(stored)} of {len(stored)} tensors" in str(result.refusal)
    assert verify(adapter=adapter, base=str(tmp_path / "base")).refusal is None
    verify(adapter=older, base=str(tmp_path / "base"), fix=True, output=tmp_path / "fixed")
    found, missing = by_peft(model, tmp_path / "base", tmp_path / "fixed")
    meant, _ = by_peft(model, tmp_path / "base", adapter)
    assert missing == []
    assert min(float(delta.norm()) for delta in meant.values()) > 0
    assert subjects.furthest(found, meant) == 0


diffusion = pytest.mark.skipif(sys.version_info < (3, 11), reason="diffusers has no release for it that fits")


def flux_adapter(root: Path) -> tuple[Path, Path, Any]:
    """A transformer of diffusers with a LoRA in the file of diffusers and in that of PEFT."""
    from diffusers import FluxPipeline
    from peft import get_peft_model_state_dict

    from tests.diffusion.pico_flux import save_flux

    model = save_flux(root / "base")
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "proj_mlp"]))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    tensors = get_peft_model_state_dict(model)
    config = model.peft_config["default"].to_dict()
    metadata = {key: value for key, value in config.items() if isinstance(value, (int, float, str, list, bool))}
    metadata["target_modules"] = sorted(config["target_modules"])
    FluxPipeline.save_lora_weights(
        root / "lora", transformer_lora_layers=tensors, transformer_lora_adapter_metadata=metadata
    )
    (root / "peft").mkdir()
    save_file({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, root / "peft" / WEIGHTS)
    (root / "peft" / CONFIG).write_text(json.dumps({**metadata, "peft_type": "LORA"}))
    return root / "lora", root / "peft", tensors


def on_flux(base: Path, lora: Path) -> dict[str, torch.Tensor]:
    """What diffusers adds to each weight of the transformer when it loads a LoRA in its own file."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(base)
    name = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(lora, prefix="transformer", adapter_name="default", weight_name=name, use_safetensors=True)
    return subjects.deltas(model)


@diffusion
def test_keys_of_diffusers_in_the_file_of_peft_become_those_of_peft(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    lora, adapter, tensors = flux_adapter(tmp_path)
    assert verify(adapter=adapter, base=str(tmp_path / "base")).refusal is None
    mixed = subjects.changed(adapter, tmp_path / "mixed", lambda name: name.replace(PREFIX, "transformer."))
    result = verify(adapter=mixed, base=str(tmp_path / "base"))
    assert f"{len(tensors)} of {len(tensors)} tensors" in str(result.refusal)
    verify(adapter=mixed, base=str(tmp_path / "base"), fix=True, output=tmp_path / "fixed")
    base = FluxTransformer2DModel.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = subjects.deltas(peft.PeftModel.from_pretrained(base, tmp_path / "fixed"))
    assert subjects.furthest(found, on_flux(tmp_path / "base", lora)) == 0


@diffusion
def test_a_lora_in_the_file_of_diffusers_is_verified_and_fixed_there(tmp_path: Path) -> None:
    lora, _, tensors = flux_adapter(tmp_path)
    result = verify(adapter=lora, base=str(tmp_path / "base"), consumers=["diffusers", "peft", "vllm"])
    assert (result.problems, result.component, result.matching) == ([], "transformer", len(tensors))
    assert [bool(each.problems) for each in result.serving] == [False, True, True]
    name = "pytorch_lora_weights.safetensors"
    with safe_open(lora / name, "pt") as file:
        metadata = file.metadata()
    compiled = {
        key.replace("_blocks.0.", "_blocks.0._orig_mod."): value for key, value in load_file(lora / name).items()
    }
    (tmp_path / "compiled").mkdir()
    save_file(compiled, tmp_path / "compiled" / name, metadata)
    result = verify(adapter=tmp_path / "compiled", base=str(tmp_path / "base"))
    assert re.search(r"\d+ of \d+ tensors .* have other names", str(result.refusal))
    verify(adapter=tmp_path / "compiled", base=str(tmp_path / "base"), fix=True, output=tmp_path / "fixed")
    meant = on_flux(tmp_path / "base", lora)
    assert subjects.furthest(on_flux(tmp_path / "base", tmp_path / "fixed"), meant) == 0
    assert set(on_flux(tmp_path / "base", tmp_path / "compiled")) != set(meant)  # the control


@diffusion
def test_alphas_in_the_file_of_diffusers_belong_to_the_pairs(tmp_path: Path) -> None:
    _, _, tensors = flux_adapter(tmp_path)
    named = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    alphas = {f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(5.0) for name in named if "lora_A" in name}
    (tmp_path / "alphas").mkdir()
    save_file(named | alphas, tmp_path / "alphas" / "pytorch_lora_weights.safetensors")
    result = verify(adapter=tmp_path / "alphas", base=str(tmp_path / "base"))
    assert (result.refusal, result.matching) == (None, len(named) + len(alphas))
    assert {group.scaling for group in result.groups} == {f"{5 / 3:.6g}"}


@diffusion
def test_another_model_of_diffusers_is_refused(tmp_path: Path) -> None:
    lora, _, _ = flux_adapter(tmp_path)
    pico.save_model(tmp_path / "llama")
    result = verify(adapter=lora, base=str(tmp_path / "llama"))
    assert "none of the" in str(result.refusal)


def test_a_lora_on_single_experts_that_the_base_holds_fused_is_named(tmp_path: Path) -> None:
    subject = subjects.make(tmp_path, "qwen3-moe", target_modules=["q_proj"])
    assert verify(adapter=subject.adapter, base=str(subject.base)).refusal is None

    def of_experts(name: str) -> str:
        return name.replace(".0.self_attn.q_proj", ".0.mlp.experts.1.gate_proj")

    result = verify(adapter=subjects.changed(subject.adapter, tmp_path / "experts", of_experts), base=str(subject.base))
    assert re.search(r"2 LoRA tensors .* are of single experts, which .* holds fused", str(result.refusal))
