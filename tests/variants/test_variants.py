"""Every kind of LoRA, trained by PEFT on an emulator: it does on the base what it did there, or is refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from emloc_tools import load_emulator
from emloc_tools.errors import EmlocError, FormatError, UnsupportedError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import correct
from emloc_tools.stages.merge import merge
from emloc_tools.stages.verify import verify
from tests import pico
from tests.variants.cases import CORRECTED, OTHER_METHODS, PASSED, REFUSED, REWRITING, Passed, Refused, Variant
from tests.variants.table import PAGE, page

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."


@dataclass(frozen=True)
class Pair:
    """A base in memory and on disk, and an emulator of it."""

    model: Any
    base: Path
    emulator: Path

    def correct(self, adapter: Path, output: Path) -> Any:
        """Without a clamp, so that the correction is exact on what the LoRA reads."""
        return correct(emulator=self.emulator, adapter=adapter, base=str(self.base), output=output, clamp=None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    model = pico.save_model(root / "base")
    build_emulator(base=str(root / "base"), ratio=0.5, output=root / "emulator")
    return Pair(model, root / "base", root / "emulator")


def train(pair: Pair, folder: Path, variant: Variant) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pico.save_lora(folder, pair.emulator, **variant.options)


def on_base(pair: Pair, adapter: Path) -> tuple[Any, list[str]]:
    """The base with an adapter as PEFT loads it, and what PEFT says is missing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = type(pair.model).from_pretrained(pair.base)
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
    return model, [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]


def updates(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By module, A and `s B A` as PEFT has them, float64; of linear layers."""
    found = {}
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None):
            A, B = (getattr(module, side)["default"].weight.detach().double() for side in ("lora_A", "lora_B"))
            found[name.removeprefix(PREFIX)] = (A, module.scaling["default"] * B @ A)
    return found


def furthest_from_emulator(pair: Pair, trained: Path, adapter: Path) -> float:
    """How far the base with `adapter` is from the emulator with the LoRA trained there, on what that LoRA reads.

    For the rows A of the trained LoRA: (W + Δ) A⁺A against (W_E + s B A) A⁺A, relative, the largest of all factored
    layers.
    """
    on_emulator = updates(peft.PeftModel.from_pretrained(load_emulator(pair.emulator), trained))
    found = updates(on_base(pair, adapter)[0])
    assert found.keys() == on_emulator.keys()
    tensors = load_file(pair.emulator / "model.safetensors")
    distances = []
    for name, (A, update) in on_emulator.items():
        if f"{name}.U" not in tensors:
            continue
        U, S, Vh = (tensors[f"{name}.{factor}"].double() for factor in ("U", "S", "Vh"))
        rows = torch.linalg.pinv(A) @ A
        meant = (U @ torch.diag(S) @ Vh + update) @ rows
        W = pair.model.get_submodule(name).weight.detach().double()
        distances.append(float(((W + found[name][1]) @ rows - meant).norm() / meant.norm()))
    assert distances
    return max(distances)


@pytest.mark.parametrize("variant", [*CORRECTED, *PASSED], ids=lambda variant: variant.name)
def test_what_is_corrected_does_on_the_base_what_it_did_on_the_emulator(
    pair: Pair, tmp_path: Path, variant: Variant
) -> None:
    trained, corrected = tmp_path / "trained", tmp_path / "corrected"
    train(pair, trained, variant)
    result = pair.correct(trained, corrected)
    assert furthest_from_emulator(pair, trained, trained) > 0.05  # the control: as it was trained
    assert furthest_from_emulator(pair, trained, corrected) < 1e-5
    _, missing = on_base(pair, corrected)
    assert missing == []
    check = verify(adapter=corrected, base=str(pair.base), emulator=pair.emulator, consumers=["peft"])
    assert (check.refusal, check.warnings, check.matching) == (None, [], check.tensors)
    before, after = load_file(trained / WEIGHTS), load_file(corrected / WEIGHTS)
    assert before.keys() == after.keys()
    expected = variant.tensors if isinstance(variant, Passed) else frozenset()
    assert all(any(name.endswith(end) for end in expected) for name in result.unchanged)
    assert all(any(name.endswith(end) for name in result.unchanged) for end in expected)
    assert all(torch.equal(before[name], after[name]) for name in result.unchanged)


@pytest.mark.parametrize("variant", CORRECTED, ids=lambda variant: variant.name)
def test_peft_runs_it_as_a_plain_update_of_the_weights(pair: Pair, tmp_path: Path, variant: Variant) -> None:
    train(pair, tmp_path / "trained", variant)
    pair.correct(tmp_path / "trained", tmp_path / "corrected")
    model, _ = on_base(pair, tmp_path / "corrected")
    plain = type(pair.model).from_pretrained(pair.base).eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        unchanged = plain(input_ids=ids).logits
        for name, (_, update) in updates(model).items():
            plain.get_submodule(name).weight += update.float()
        expected, found = plain(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(unchanged, expected, atol=1e-2)


@pytest.mark.parametrize("variant", REFUSED, ids=lambda variant: variant.name)
def test_what_cannot_be_corrected_is_refused_with_the_reason(pair: Pair, tmp_path: Path, variant: Refused) -> None:
    train(pair, tmp_path / "trained", variant)
    with pytest.raises(EmlocError, match=variant.message) as caught:
        pair.correct(tmp_path / "trained", tmp_path / "corrected")
    assert str(tmp_path / "trained") in str(caught.value)
    assert not (tmp_path / "corrected").exists()


@pytest.mark.parametrize("options", REWRITING.values(), ids=REWRITING)
def test_what_rewrites_weights_cannot_be_put_on_an_emulator(
    pair: Pair, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = type(pair.model).from_pretrained(pair.base)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "trained")  # the control: on the base it can
    with pytest.raises(RuntimeError, match="emulator"):
        peft.get_peft_model(load_emulator(pair.emulator), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with pytest.raises(UnsupportedError, match=r"was trained with (init_lora_weights='|kasa_config)"):
        pair.correct(tmp_path / "trained", tmp_path / "corrected")


@pytest.mark.parametrize("config", OTHER_METHODS.values(), ids=OTHER_METHODS)
def test_other_methods_than_lora_are_refused(pair: Pair, tmp_path: Path, config: Any) -> None:
    peft.get_peft_model(type(pair.model).from_pretrained(pair.base), config()).save_pretrained(tmp_path / "trained")
    with pytest.raises(FormatError, match=r"peft_type: is '\w+'; only LORA adapters can be used"):
        pair.correct(tmp_path / "trained", tmp_path / "corrected")


def test_adapters_of_several_names_are_corrected_one_by_one(pair: Pair, tmp_path: Path) -> None:
    """PEFT saves each in a folder of its name, but for `default`, and leaves the names out of the keys."""
    first, second = {"r": 4, "lora_alpha": 6}, {"r": 2, "lora_alpha": 3, "use_rslora": True}
    model = peft.get_peft_model(
        load_emulator(pair.emulator), peft.LoraConfig(**first, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.add_adapter("other", peft.LoraConfig(**second, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained")
    for folder, pairs in ((tmp_path / "trained", 3), (tmp_path / "trained" / "other", 6)):
        output = tmp_path / f"corrected-{folder.name}"
        assert len(pair.correct(folder, output).layers) == pairs
        assert furthest_from_emulator(pair, folder, folder) > 0.05
        assert furthest_from_emulator(pair, folder, output) < 1e-5


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            PASSED[3],
            r"trainable_tokens_delta, which is trained rows of an embedding; merge it with PEFT's merge_and_un",
        ),
        (PASSED[4], r"lora_velora_embed, which is not a pair of a linear layer; merge it with PEFT's merge_and_unload"),
        (PASSED[5], r"expert_weights, which is not a pair of a linear layer; merge it with PEFT's merge_and_unload"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_merge_does_not_merge_is_left_to_peft(pair: Pair, tmp_path: Path, variant: Variant, message: str) -> None:
    train(pair, tmp_path / "trained", variant)
    pair.correct(tmp_path / "trained", tmp_path / "corrected")
    with pytest.raises(UnsupportedError, match=message):
        merge(base=str(pair.base), adapter=tmp_path / "corrected", output=tmp_path / "merged")
    merged = on_base(pair, tmp_path / "corrected")[0].merge_and_unload()  # and PEFT does it
    weights = dict(merged.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(weights, pair.model.get_parameter("model.layers.0.self_attn.q_proj.weight"))


def test_the_table_in_the_documentation_is_of_these_cases() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.variants.table`"
