"""An adapter trained elsewhere and corrected here is an ordinary PEFT adapter for the base: it loads and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import pico
from tests.external.workshop import Case, factored_layers, oriented

SCALING = 6 / 4  # lora_alpha / r of the scripts
FLOAT32 = 20 * torch.finfo(torch.float32).eps  # relative; for sums of a few dozen products


def pairs(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every module, in float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    stored = {module: f"base_model.model.{module}.lora_" for module in modules}
    return {m: (tensors[f"{key}A.weight"].double(), tensors[f"{key}B.weight"].double()) for m, key in stored.items()}


def merged_weights(case: Case, output: Path) -> dict[str, torch.Tensor]:
    """What the environment merged."""
    tensors = load_file(output / f"{case.name}-merged.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("logits ")}


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal up to float32 rounding of the largest value."""
    assert (found.double() - expected).abs().max() <= FLOAT32 * expected.abs().max(), name


def test_it_loads_on_the_base_without_a_complaint(serving: dict[str, Any]) -> None:
    assert serving["complaints"] == {"warnings": [], "missing": [], "unexpected": []}


def test_peft_complains_about_one_tensor_less(serving: dict[str, Any]) -> None:
    """Otherwise the silence above would say nothing."""
    assert len(serving["incomplete"]["missing"]) == 1
    assert len(serving["incomplete"]["warnings"]) == 1


def test_its_own_configuration_leads_to_the_base(
    serving: dict[str, Any], case: Case, output: Path, environment: str
) -> None:
    """The trained adapter named the emulator, and where it had no task type also the emulator's class."""
    trained, corrected = (
        json.loads((output / case.name / kind / "adapter_config.json").read_text()) for kind in ("adapter", "corrected")
    )
    assert Path(trained["base_model_name_or_path"]) == case.emulator
    assert Path(corrected["base_model_name_or_path"]) == case.base
    assert serving["class"] == pico.CLASSES[case.name]
    logits = load_file(output / f"{case.name}-merged.safetensors")
    assert_near(logits["logits alone"], logits["logits adapter"].double(), environment)


def test_the_merged_weights_are_those_of_the_files(serving: dict[str, Any], case: Case, output: Path) -> None:
    base = load_file(case.base / "model.safetensors")
    merged = merged_weights(case, output)
    adapter = pairs(output / case.name / "corrected")
    assert adapter
    for name, found in merged.items():
        if name not in base:
            continue  # a module that shares another's weight, which is compared under that one's name
        module = name.removesuffix(".weight")
        if module not in adapter:
            assert torch.equal(found, base[name]), name
            continue
        A, B = adapter[module]
        update = oriented(case.name, SCALING * B @ A)
        assert_near(found, base[name].double() + update, name)
        assert update.abs().max() > 1000 * FLOAT32 * base[name].abs().max(), "too small an update to see"
    assert {f"{module}.weight" for module in adapter} <= set(merged) & set(base)


def test_merging_does_not_change_what_the_model_computes(
    serving: dict[str, Any], case: Case, output: Path, environment: str
) -> None:
    logits = load_file(output / f"{case.name}-merged.safetensors")
    found, expected = logits["logits merged"].double(), logits["logits adapter"].double()
    base = case.reference_logits(dense_emulator=False)
    limit = 10 * FLOAT32 * expected.abs().max()  # rounding adds up over the layers
    assert (found - expected).abs().max() < limit
    assert (found - base).abs().max() > 100 * limit, "the adapter does nothing"


def test_on_what_the_lora_reads_the_merged_base_agrees_with_the_trained_emulator(
    serving: dict[str, Any], case: Case, output: Path
) -> None:
    """Without clamp, (W + s B'' A') x = (W_E + s B A) x for every x in the row space of the trained A."""
    base, emulator = (load_file(folder / "model.safetensors") for folder in (case.base, case.emulator))
    merged = merged_weights(case, output)
    trained = pairs(output / case.name / "adapter")
    for module in factored_layers(case.emulator):
        A, B = trained[module]
        X = torch.linalg.qr(A.T).Q  # (in, r)
        U, S, Vh = (emulator[f"{module}.{factor}"].double() for factor in ("U", "S", "Vh"))
        expected = (U @ torch.diag(S) @ Vh + SCALING * B @ A) @ X
        W, W_merged = (oriented(case.name, weights[f"{module}.weight"]).double() for weights in (base, merged))
        limit = 1e-5 * expected.abs().max()  # A' is stored in float32, and the pair's terms partly cancel
        assert (W_merged @ X - expected).abs().max() < limit, module
        assert ((W + SCALING * B @ A) @ X - expected).abs().max() > 100 * limit, "correcting makes no difference here"
