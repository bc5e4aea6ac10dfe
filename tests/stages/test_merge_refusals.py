"""merge: what would give a wrong model without a sign is refused, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from emloc_tools.errors import FormatError, InputError, MismatchError, NumericalError, UnsupportedError
from emloc_tools.stages.merge import merge
from tests import pico
from tests.conftest import Run
from tests.stages.adapters import changed
from tests.stages.merging import Case, load_all, make_case
from tests.stages.reference import close_to, contents, read_json, read_tensors


def refuse(base: Path, adapter: Path, error: type[Exception], message: str, **options: Any) -> None:
    """Merging must raise and leave nothing beside the adapter."""
    before = set(adapter.parent.iterdir())
    with pytest.raises(error, match=message):
        merge(base=str(base), adapter=adapter, output=adapter.parent / "merged", **options)
    assert set(adapter.parent.iterdir()) == before


def refuse_case(case: Case, error: type[Exception], message: str, **options: Any) -> None:
    """The same for a case."""
    refuse(case.base, case.adapter, error, message, **options)


def copied(run: Run, tmp_path: Path) -> Path:
    """The run's trained LoRA in a folder of the test."""
    return changed(run.adapter, tmp_path / "adapter")


def test_a_lora_of_an_emulator_must_be_corrected_or_interpolated(run: Run, tmp_path: Path) -> None:
    adapter = copied(run, tmp_path)
    refuse(run.base, adapter, MismatchError, r"was trained on the emulator .* not corrected; run emloc-tools correct")
    merge(base=str(run.base), adapter=run.corrected, output=tmp_path / "merged")  # control
    assert (tmp_path / "merged" / "config.json").is_file()


def test_an_emulator_that_was_moved_is_told_by_the_class_that_the_adapter_names(run: Run, tmp_path: Path) -> None:
    pico.save_lora(tmp_path / "trained", run.emulator, task_type=None)
    assert "Emloc" in read_json(tmp_path / "trained" / "adapter_config.json")["auto_mapping"]["base_model_class"]
    (tmp_path / "its").mkdir()
    adapter = changed(tmp_path / "trained", tmp_path / "its" / "adapter", base_model_name_or_path="moved/away")
    refuse(run.base, adapter, MismatchError, r"was trained on the emulator moved/away and is not corrected")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", None, 3, ["list"]], ids=["long", "NUL", "none", "number", "list"])
def test_a_base_name_that_is_no_path_is_no_obstacle(name: object, tmp_path: Path) -> None:
    case = make_case(tmp_path)
    adapter = changed(case.adapter, tmp_path / "odd", base_model_name_or_path=name)
    merge(base=str(case.base), adapter=adapter, output=tmp_path / "merged")
    load_all(tmp_path / "merged", type(case.model))


def test_a_corrected_adapter_is_not_interpolated(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.corrected, tmp_path / "corrected")
    message = r"is corrected for the base already; merge it without --emulator and --interpolate"
    refuse(run.base, tmp_path / "corrected", MismatchError, message, emulator=run.emulator, interpolate=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(run: Run, tmp_path: Path, share: float) -> None:
    adapter = copied(run, tmp_path)
    message = r"--interpolate \S+ is outside 0 \(the base\) to 1"
    refuse(run.base, adapter, InputError, message, emulator=run.emulator, interpolate=share)


def test_emulator_and_interpolate_go_together(run: Run, tmp_path: Path) -> None:
    adapter = copied(run, tmp_path)
    refuse(run.base, adapter, InputError, "--emulator needs --interpolate", emulator=run.emulator)
    refuse(run.base, adapter, InputError, "--interpolate needs --emulator", interpolate=0.5)


def test_another_base_than_that_of_the_emulator_is_refused_even_where_no_lora_is(run: Run, tmp_path: Path) -> None:
    pico.save_lora(tmp_path / "adapter", run.emulator, target_modules=["q_proj"])
    (tmp_path / "bases").mkdir()
    for number, name in enumerate(["model.layers.2.mlp.up_proj.weight", "model.norm.weight"]):
        base = tmp_path / "bases" / str(number)
        shutil.copytree(run.base, base)
        tensors = read_tensors(base)
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        message = rf"{name} of .* is not the weight that the emulator in .* was made from .*pass that very model"
        refuse(base, tmp_path / "adapter", MismatchError, message, emulator=run.emulator, interpolate=0.5)


def test_a_base_without_layers_that_the_emulator_factors_is_refused(run: Run, tmp_path: Path) -> None:
    config = pico.config("llama")
    config.num_hidden_layers = 2
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    pico.save_lora(tmp_path / "adapter", run.emulator, target_modules=r".*layers\.0\..*q_proj")
    message = r"the emulator's layer model\.layers\.2\..* is not in .*; pass the model that it was made from"
    refuse(tmp_path / "base", tmp_path / "adapter", MismatchError, message, emulator=run.emulator, interpolate=0.5)


@pytest.mark.parametrize("interpolate", [None, 0.5])
def test_another_architecture_is_refused(run: Run, tmp_path: Path, interpolate: float | None) -> None:
    pico.save_model(tmp_path / "gpt2", "gpt2")
    (tmp_path / "its").mkdir()
    adapter = changed(run.corrected if interpolate is None else run.adapter, tmp_path / "its" / "adapter")
    made = "adapter was corrected for" if interpolate is None else "emulator was made from"
    options = {} if interpolate is None else {"emulator": run.emulator, "interpolate": interpolate}
    message = rf"is a GPT2LMHeadModel, the {made} a LlamaForCausalLM"
    refuse(tmp_path / "gpt2", adapter, MismatchError, message, **options)


def test_an_emulator_as_the_base_is_refused(run: Run, tmp_path: Path) -> None:
    refuse(run.emulator, copied(run, tmp_path), InputError, "is an emulator; pass the model that it was made from")


def test_an_adapter_is_not_merged_twice(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    merge(base=str(case.base), adapter=case.adapter, output=tmp_path / "once")
    refuse(
        tmp_path / "once", case.adapter, MismatchError, r"is a merged model and has .*adapter in its weights already"
    )
    other = changed(case.adapter, tmp_path / "other", tensor=lambda name, value: (name, 2 * value))
    merge(base=str(tmp_path / "once"), adapter=other, output=tmp_path / "both")
    first, both = read_tensors(tmp_path / "once"), read_tensors(tmp_path / "both")
    before, name = read_tensors(case.base), "model.layers.1.mlp.up_proj.weight"
    assert close_to(both[name] - first[name], 4 * (first[name] - before[name])) < 1e-5  # A and B doubled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"was trained with use_dora"),
        ({"lora_bias": True, "target_modules": ["c_attn"]}, r"was trained with lora_bias"),
        ({"bias": "all"}, r'was trained with bias="all"'),
    ],
    ids=["DoRA", "LoRA bias", "all biases"],
)
def test_adapters_beyond_plain_pairs_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    case = make_case(tmp_path, "gpt2" if "lora_bias" in options else "llama", **options)
    refuse_case(case, UnsupportedError, message)


def test_an_adapted_embedding_that_is_tied_or_of_another_size_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path / "tied", "llama-tied", target_modules=["q_proj", "embed_tokens"])
    tensors = {name: value for name, value in read_tensors(case.adapter).items() if "base_layer" not in name}
    save_file(tensors, case.adapter / "adapter_model.safetensors")  # as with save_embedding_layers=False
    refuse_case(case, UnsupportedError, r"embed_tokens\.weight is tied to lm_head\.weight")
    case = make_case(tmp_path / "resized", target_modules=["q_proj", "embed_tokens"])
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    tensors = {name: value for name, value in read_tensors(case.adapter).items() if "base_layer" not in name}
    save_file({**tensors, key: tensors[key][:, :-4].contiguous()}, case.adapter / "adapter_model.safetensors")
    refuse_case(case, MismatchError, r"pair of model\.embed_tokens is for 256 x 32, the embedding of .* is 260 x 32")


@pytest.mark.parametrize("target", ["lm_head", "saved"])
def test_a_change_of_one_of_two_tied_weights_is_refused(tmp_path: Path, target: str) -> None:
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    case = make_case(tmp_path, "llama-tied", **(saved if target == "saved" else {"target_modules": ["lm_head"]}))
    refuse_case(case, UnsupportedError, r"lm_head\.weight is tied to model\.embed_tokens\.weight")


def test_a_pair_on_one_of_two_tied_weights_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama-tied", target_modules=["lm_head"])
    tensors = {name: value for name, value in read_tensors(case.adapter).items() if ".lora_" in name}
    assert len(tensors) == 2  # PEFT saves the head's weight with them, but for save_embedding_layers=False
    save_file(tensors, case.adapter / "adapter_model.safetensors")
    refuse_case(case, UnsupportedError, r"lm_head\.weight is tied to model\.embed_tokens\.weight")


def test_tied_weights_that_the_adapter_saves_apart_are_refused(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    case = make_case(tmp_path, "llama-tied", **options)
    refuse_case(case, UnsupportedError, r"is tied to")


def test_a_lora_on_experts_that_are_fused_in_the_model_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, "qwen3-moe", target_modules=["q_proj"])
    up = "model.layers.1.mlp.experts.2.up_proj"

    def on_an_expert(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.replace("model.layers.1.self_attn.q_proj", up), value

    adapter = changed(case.adapter, tmp_path / "experts", tensor=on_an_expert)
    message = rf"adapts {up}, which Qwen3MoeForCausalLM holds inside model\.layers\.1\.mlp\.experts\.gate_up_proj"
    refuse(case.base, adapter, UnsupportedError, message)


def test_a_saved_module_that_the_checkpoint_holds_in_parts_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, "qwen3-moe", target_modules=["q_proj"], modules_to_save=["mlp"])
    refuse_case(case, UnsupportedError, r"experts\.\w+ is made from other tensors when Qwen3MoeForCausalLM is loaded")


def test_layers_that_the_base_does_not_have_are_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    adapter = changed(
        case.adapter, tmp_path / "other", tensor=lambda name, value: (name.replace("layers.2", "layers.7"), value)
    )
    refuse(case.base, adapter, MismatchError, r"adapts model\.layers\.7\..*, which .* does not have")


def test_pairs_of_other_widths_are_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)

    def narrower(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, value[:, 1:].contiguous() if "lora_A" in name else value

    adapter = changed(case.adapter, tmp_path / "narrow", tensor=narrower)
    refuse(case.base, adapter, MismatchError, r"is for \d+ x \d+, the layer of .* is \d+ x \d+")


def test_a_saved_module_that_was_resized_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])

    def longer(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, torch.cat([value, value[:4]]) if "lm_head" in name else value

    adapter = changed(case.adapter, tmp_path / "longer", tensor=longer)
    refuse(case.base, adapter, MismatchError, r"saves lm_head\.weight .*\[264, 32\], in .* it is .*\[260, 32\]")


def test_a_new_head_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = changed(
        case.adapter, tmp_path / "head", tensor=lambda name, value: (name.replace("lm_head", "score"), value)
    )
    refuse(case.base, adapter, MismatchError, r"holds base_model\.model\.score\.weight, which .* a new head cannot")


def test_saved_factors_are_refused(run: Run, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    pico.save_lora(adapter, run.emulator, target_modules=["v_proj"], modules_to_save=["q_proj"])
    message = r"saves model\.layers\.0\.self_attn\.q_proj as a whole .*leave it out of modules_to_save"
    refuse(run.base, adapter, UnsupportedError, message, emulator=run.emulator, interpolate=0.5)


def test_a_lora_that_diverged_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    case = make_case(tmp_path)

    def diverged(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, value * float("nan") if "layers.1.mlp.up_proj.lora_B" in name else value

    adapter = changed(case.adapter, tmp_path / "nan", tensor=diverged)

    def work(step: object) -> None:
        pytest.fail("work began")

    refuse(case.base, adapter, FormatError, r"layers\.1\.mlp\.up_proj\.lora_B.* holds NaN or infinity", progress=work)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_base_with_nan_is_refused(tmp_path: Path, name: str) -> None:
    case = make_case(tmp_path)
    tensors = read_tensors(case.base)
    tensors[name].view(-1)[5] = torch.nan
    save_file(tensors, case.base / "model.safetensors", metadata={"format": "pt"})
    refuse_case(case, NumericalError, rf"the weight {name} holds NaN or infinity")


def test_values_beyond_the_dtype_are_refused_by_name(tmp_path: Path) -> None:
    case = make_case(tmp_path, save={"dtype": torch.float16}, target_modules=["q_proj"])

    def large(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, value * (1000 if "layers.1" in name else 1)

    adapter = changed(case.adapter, tmp_path / "large", tensor=large)
    message = r"layers\.1\.self_attn\.q_proj\.weight: the merged weight is beyond what torch\.float16 holds; .*--dtype"
    refuse(case.base, adapter, NumericalError, message)
    merge(base=str(case.base), adapter=adapter, output=tmp_path / "wide", dtype="bfloat16")  # the remedy


def test_values_that_a_requested_dtype_does_not_hold_are_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    tensors = read_tensors(case.base)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, case.base / "model.safetensors", metadata={"format": "pt"})
    refuse_case(case, NumericalError, r"model\.norm\.weight: .*beyond what torch\.float16 holds", dtype="float16")


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_an_output_in_the_place_of_an_input_is_refused(tmp_path: Path, place: str) -> None:
    case = make_case(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="would replace the input"):
        merge(base=str(case.base), adapter=case.adapter, output=tmp_path / place, overwrite=True)
    assert contents(tmp_path) == before


def test_a_module_that_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, target_modules=["q_proj"])

    def on_a_norm(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.replace("model.layers.1.self_attn.q_proj", "model.norm"), value

    adapter = changed(case.adapter, tmp_path / "norm", tensor=on_a_norm)
    refuse(case.base, adapter, UnsupportedError, r"model\.norm of .* is a LlamaRMSNorm and no linear layer")
