"""Ways to initialise a LoRA: those that rewrite the model's weights are refused, for they do not mean W + s B A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from emloc_tools.errors import UnsupportedError
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from emloc_tools.stages.merge import merge
from tests.conftest import Run
from tests.stages.adapters import changed, pairs
from tests.stages.merging import Case, make_case, merge_case
from tests.stages.reference import close_to, read_json, read_tensors

SCALING = 6 / 4  # alpha and rank of `make_case`
REWRITING = ["pissa", "pissa_niter_2", "olora"]
MESSAGE = r"was trained with init_lora_weights='{}', which rewrites the weights .*convert it to a plain LoRA with PEFT"


def merged_by_peft(case: Case) -> dict[str, torch.Tensor]:
    """The weights of the adapted layers, float64."""
    model = case.in_memory()
    return {name: model.get_submodule(name).weight.detach().double() for name in pairs(case.adapter)}


def plainly_merged(case: Case) -> dict[str, torch.Tensor]:
    """`W + s B A` of the same layers."""
    before = read_tensors(case.base)
    return {name: before[f"{name}.weight"].double() + SCALING * B @ A for name, (A, B) in pairs(case.adapter).items()}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(expected)
    return max(close_to(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_an_init_that_leaves_the_weights_alone_is_merged_as_peft_merges_it(tmp_path: Path, init: Any) -> None:
    case = make_case(tmp_path, init_lora_weights=init)
    assert read_json(case.adapter / "adapter_config.json")["init_lora_weights"] == init
    merge_case(case, tmp_path / "merged")
    tensors = read_tensors(tmp_path / "merged")
    found = {name: tensors[f"{name}.weight"].double() for name in pairs(case.adapter)}
    assert furthest(found, merged_by_peft(case)) < 1e-6
    assert furthest(found, plainly_merged(case)) < 1e-6


@pytest.mark.parametrize("init", REWRITING)
def test_an_init_that_rewrites_the_weights_is_not_merged(tmp_path: Path, init: str) -> None:
    case = make_case(tmp_path, init_lora_weights=init)
    with pytest.raises(UnsupportedError, match=MESSAGE.format(init)):
        merge_case(case, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    meant = merged_by_peft(case)  # every layer would have got another weight
    assert all(close_to(W, meant[name]) > 0.1 for name, W in plainly_merged(case).items())


@pytest.mark.parametrize("init", REWRITING)
def test_an_init_that_rewrites_the_weights_is_neither_evaluated_nor_corrected(
    run: Run, tmp_path: Path, init: str
) -> None:
    case = make_case(tmp_path, init_lora_weights=init)
    with pytest.raises(UnsupportedError, match=MESSAGE.format(init)):
        evaluate(base=str(case.base), adapters=[case.adapter], data=run.data, device="cpu")
    for output in (None, tmp_path / "corrected"):
        with pytest.raises(UnsupportedError, match=MESSAGE.format(init)):
            correct(emulator=run.emulator, adapter=case.adapter, base=str(run.base), output=output)
    assert not (tmp_path / "corrected").exists()


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "OLoRA", "PiSSA", "one to come", 1, ["pissa"]])
def test_other_inits_are_refused_before_a_weight_is_read(run: Run, tmp_path: Path, init: object) -> None:
    adapter = changed(run.corrected, tmp_path / "adapter", init_lora_weights=init)
    with pytest.raises(UnsupportedError, match=r"was trained with init_lora_weights="):
        evaluate(base=str(run.base), adapters=[adapter], data=tmp_path / "absent", device="cpu")


@pytest.mark.parametrize("init", [None, "Gaussian"])
def test_no_init_and_other_spellings_change_no_figure(run: Run, tmp_path: Path, init: object) -> None:
    adapter = changed(run.corrected, tmp_path / "adapter", init_lora_weights=init)
    found = evaluate(base=str(run.base), adapters=[run.corrected, adapter], data=run.data, device="cpu")
    assert found[1].loss == found[2].loss != found[0].loss


def test_a_lora_beside_weights_that_kasa_cut_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, kasa_config=peft.KasaConfig())
    with pytest.raises(UnsupportedError, match="was trained with kasa_config"):
        merge(base=str(case.base), adapter=case.adapter, output=tmp_path / "merged")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_conversion_that_the_message_names_makes_it_usable(tmp_path: Path, init: str) -> None:
    """PEFT doubles the rank and subtracts what the init had put into A and B."""
    base = make_case(tmp_path).base
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init)
    trained = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    trained.save_pretrained(tmp_path / "before")
    for name, parameter in trained.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    trained.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    expected = trained.merge_and_unload()
    merge(base=str(base), adapter=tmp_path / "converted", output=tmp_path / "merged")
    tensors = read_tensors(tmp_path / "merged")
    for name in pairs(tmp_path / "converted"):
        W = expected.get_submodule(name).weight.detach().double()
        assert close_to(tensors[f"{name}.weight"].double(), W) < 1e-5
