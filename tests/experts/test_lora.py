"""A LoRA beside factored experts: trained, corrected, used with the base; one on experts is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from emloc_tools import load_emulator
from emloc_tools.errors import UnsupportedError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from emloc_tools.stages.merge import merge
from tests import pico
from tests.experts.conftest import Case
from tests.experts.families import FAMILIES
from tests.stages.reference import close_to, read_json, read_tensors

ATTENTION = ["q_proj", "o_proj"]


@pytest.fixture(scope="module")
def built(case_of: Callable[[str], Case], tmp_path_factory: Any) -> Callable[[str], tuple[Case, Path]]:
    """A case and its emulator, weighted by gradients."""
    made: dict[str, tuple[Case, Path]] = {}

    def make(family: str) -> tuple[Case, Path]:
        if family not in made:
            case, output = case_of(family), tmp_path_factory.mktemp(family) / "emulator"
            build_emulator(base=str(case.base), calibration=case.calibration, ratio=0.4, output=output)
            made[family] = case, output
        return made[family]

    return make


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_a_lora_on_the_attention_trains_and_is_corrected_for_the_base(
    built: Callable[[str], tuple[Case, Path]], family: str, tmp_path: Path
) -> None:
    case, emulator = built(family)
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(load_emulator(emulator), peft.LoraConfig(**settings))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    ids = torch.tensor([pico.token_ids(case.data, case.base, 40)[2]])
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "lora")

    # On the base PEFT adapts the same modules under the same names.
    base = getattr(transformers, FAMILIES[family].cls).from_pretrained(case.base)
    of_base = peft.get_peft_model_state_dict(peft.get_peft_model(base, peft.LoraConfig(**settings)))
    assert {name: tensor.shape for name, tensor in of_base.items()} == {
        name: tensor.shape for name, tensor in read_tensors(tmp_path / "lora").items()
    }

    result = correct(
        emulator=emulator, adapter=tmp_path / "lora", base=str(case.base), output=tmp_path / "corrected", clamp=None
    )
    assert len(result.layers) == 4
    trained, corrected = read_tensors(tmp_path / "lora"), read_tensors(tmp_path / "corrected")
    factors = read_tensors(emulator)
    for name in result.layers:
        key = f"base_model.model.{name}.lora_{{}}.weight"
        A, B = (trained[key.format(side)].double() for side in "AB")
        A_new, B_new = (corrected[key.format(side)].double() for side in "AB")
        W = case.model.get_submodule(name).weight.detach().double()
        U, S, Vh = (factors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
        x = torch.randn(3, 5, dtype=torch.float64).mT @ A  # in the row space of A
        wanted = x @ ((U * S) @ Vh + 2 * B @ A).T
        assert close_to(x @ (W + 2 * B_new @ A_new).T, wanted) < 1e-4
        assert close_to(x @ (W + 2 * B @ A).T, wanted) > 1e-3  # control: uncorrected


def test_merging_and_measuring_work_beside_experts(built: Callable[[str], tuple[Case, Path]], tmp_path: Path) -> None:
    case, emulator = built("mixtral")
    pico.save_lora(tmp_path / "lora", emulator, target_modules=ATTENTION)
    correct(emulator=emulator, adapter=tmp_path / "lora", base=str(case.base), output=tmp_path / "corrected")
    merge(base=str(case.base), adapter=tmp_path / "corrected", output=tmp_path / "merged")
    merged = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "merged")
    base = transformers.MixtralForCausalLM.from_pretrained(case.base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "corrected")
    ids = torch.tensor([pico.token_ids(case.data, case.base, 40)[2]])
    with torch.no_grad():
        expected = adapted(ids).logits
        assert close_to(merged(ids).logits, expected) < 1e-5
    of_emulator = evaluate(data=case.data, emulator=emulator, max_length=40, device="cpu")[0]
    model, total, count = load_emulator(emulator).eval(), 0.0, 0
    for sample in pico.token_ids(case.data, case.base, 40):
        with torch.no_grad():
            logits = model(torch.tensor([sample])).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(sample[1:]), reduction="sum"))
        count += len(sample) - 1
    assert of_emulator.loss == pytest.approx(total / count, rel=1e-4)
    with pytest.raises(UnsupportedError, match="holds experts as factors"):
        merge(
            base=str(case.base), adapter=tmp_path / "lora", emulator=emulator, interpolate=0.5, output=tmp_path / "half"
        )


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("targets", [{"target_modules": "all-linear"}, {"target_parameters": ["experts.down_proj"]}])
def test_a_lora_that_would_target_experts_is_refused_before_training(
    built: Callable[[str], tuple[Case, Path]], family: str, targets: dict[str, Any]
) -> None:
    """PEFT makes target_parameters of all-linear for Mixtral and Qwen3-MoE, and not for GPT-OSS."""
    _, emulator = built(family)
    auto = transformers.AutoModelForCausalLM
    settings = {"target_modules": ["q_proj"], **targets, "task_type": "CAUSAL_LM"}
    for model in (load_emulator(emulator), auto.from_pretrained(emulator, trust_remote_code=True)):
        if family == "gpt-oss" and "target_parameters" not in targets:
            adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
            assert not [name for name, _ in adapted.named_parameters() if "lora" in name and "experts" in name]
            continue
        with pytest.raises(ValueError, match=r"the experts of an EMLoC emulator are frozen and take no LoRA"):
            peft.get_peft_model(model, peft.LoraConfig(**settings))


def test_names_of_projections_find_nothing_in_the_emulator_that_they_do_not_find_in_the_base(
    built: Callable[[str], tuple[Case, Path]],
) -> None:
    """A module called `down_proj` in the place of the experts' tensor would be taken for a target, and refused."""
    case, emulator = built("gpt-oss")
    settings = {"target_modules": ["q_proj", "gate_up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    models = transformers.GptOssForCausalLM.from_pretrained(case.base), load_emulator(emulator)
    of_base, of_emulator = (
        set(peft.get_peft_model_state_dict(peft.get_peft_model(model, peft.LoraConfig(**settings)))) for model in models
    )
    assert of_base == of_emulator
    assert len(of_base) == 4


def test_ranks_and_factors_of_stacks_follow_the_loss(built: Callable[[str], tuple[Case, Path]], tmp_path: Path) -> None:
    case, emulator = built("qwen3-moe")
    manifest = read_json(emulator / "emulator.json")
    assert (manifest["format_version"], manifest["allocation"]) == (3, "adaptive")
    members = {f"{stack}.{number}" for stack, W in case.W.items() for number in range(len(W))}
    assert members <= manifest["weighting"]["sensitivity"].keys()
    assert len({record["rank"] for record in manifest["experts"].values()}) > 1
    uniform = {n: int(0.4 * W.shape[1] * W.shape[2] / (W.shape[1] + W.shape[2])) for n, W in case.W.items()}
    assert any(record["rank"] != uniform[name] for name, record in manifest["experts"].items())
    spent = sum(
        len(record["experts"]) * record["rank"] * (record["out_features"] + record["in_features"] + 1)
        for record in manifest["experts"].values()
    ) + sum(r["rank"] * (r["out_features"] + r["in_features"] + 1) for r in manifest["layers"].values())
    allowed = sum(len(W) * uniform[name] * (W.shape[1] + W.shape[2] + 1) for name, W in case.W.items())
    for record in manifest["layers"].values():
        out, into = record["out_features"], record["in_features"]
        allowed += int(0.4 * out * into / (out + into)) * (out + into + 1)
    assert 0.97 * allowed < spent <= allowed
