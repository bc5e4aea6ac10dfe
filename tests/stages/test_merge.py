"""merge: the dense model on disk has the weights, to one rounding, that arithmetic and PEFT give in memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from emloc_tools.stages.evaluate import evaluate
from emloc_tools.stages.merge import merge
from tests import pico
from tests.conftest import Run
from tests.stages.adapters import changed, on, pairs
from tests.stages.merging import Case, Make, load_all, logits, make_case, merge_case
from tests.stages.reference import close_to, read_json, read_tensors

FLOAT32 = 1e-6  # a few float32 roundings, relative
PATTERN = {"embed_tokens": 9}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"v_proj": 9}},
    ),
    "Conv1D": ("gpt2", {"fan_in_fan_out": True}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "BERT without a task": ("bert", {"task_type": None, "target_modules": r".*layer\..*(query|key|value|dense)"}),
    "attention beside fused experts": ("qwen3-moe", {"target_modules": ["q_proj", "o_proj"]}),
    "embedding and head": (
        "qwen2",
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "alpha_pattern": PATTERN},
    ),
    "embedding alone": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "tied embeddings": ("llama-tied", {"target_modules": ["q_proj", "down_proj"]}),
}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A base of a family and a LoRA on it, in the test's folder."""
    return functools.partial(make_case, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3], ids=["single file", "shards"])
def test_weights_and_logits_are_those_of_peft(kind: str, shards: int, make: Make, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    case = make(family, {} if shards == 1 else {"max_shard_size": "80KB"}, **options)
    merge_case(case, tmp_path / "merged", max_shard_size=10**9 if shards == 1 else 80_000)
    assert (len(list((tmp_path / "merged").glob("*.safetensors"))) > 1) == (shards > 1)
    merged, expected = load_all(tmp_path / "merged", type(case.model)), case.in_memory()
    state = merged.state_dict()
    for name, tensor in expected.state_dict().items():
        assert close_to(state[name], tensor) < FLOAT32, name
    assert close_to(logits(merged), logits(expected)) < 1e-5
    assert close_to(logits(case.model), logits(expected)) > 1e-3


@pytest.mark.parametrize("kind", ["rsLoRA", "patterns", "Conv1D", "attention beside fused experts"])
def test_adapted_weights_are_W_plus_sBA_and_all_others_keep_their_bytes(kind: str, make: Make, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    case = make(family, **options)
    result = merge_case(case, tmp_path / "merged")
    before, after = read_tensors(case.base), read_tensors(tmp_path / "merged")
    assert list(before) == list(after)
    adapted = {f"{module}.weight": pair for module, pair in pairs(case.adapter).items()}
    assert result.merged == sorted(adapted)
    assert result.copied == len(before) - len(adapted) > 0
    config = read_json(case.adapter / "adapter_config.json")
    for name, tensor in before.items():
        if name not in adapted:
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
            continue
        A, B = adapted[name]
        alphas = [alpha for key, alpha in config["alpha_pattern"].items() if name.endswith(f"{key}.weight")]
        r = A.shape[0]
        scaling = (alphas or [6])[0] / (r**0.5 if config["use_rslora"] else r)
        update = scaling * (B @ A)
        expected = tensor.double() + (update.T if family == "gpt2" else update)
        assert close_to(after[name], expected) < FLOAT32
        assert close_to(after[name], tensor) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    case = make("llama", {"dtype": dtype})
    merge_case(case, tmp_path / "merged")
    before, after = read_tensors(case.base), read_tensors(tmp_path / "merged")
    twice = wrong = 0
    for module, (A, B) in pairs(case.adapter).items():
        W, found = before[f"{module}.weight"], after[f"{module}.weight"]
        exact = W.double() + 1.5 * (B @ A)
        assert found.dtype == dtype
        error, best = (found.double() - exact).abs(), (exact.to(dtype).double() - exact).abs()
        # No other number of that dtype is nearer, but where two are equally near to float32's precision.
        assert (error <= best + 1e-6 * exact.abs() + 1e-7).all()
        update = (1.5 * (B @ A)).to(dtype)
        twice += int(((W + update).double() - exact).abs().gt(best + 1e-5).sum())
        wrong += int(error.gt(best + 1e-5).sum())
    assert wrong == 0
    assert twice > 100  # the control: rounding the update first is not the same


def test_a_requested_dtype_is_that_of_all_tensors_and_of_the_configuration(make: Make, tmp_path: Path) -> None:
    case = make()
    merge_case(case, tmp_path / "merged", dtype="bfloat16")
    before, after = read_tensors(case.base), read_tensors(tmp_path / "merged")
    adapted = pairs(case.adapter)
    for name, tensor in after.items():
        A, B = adapted.get(name.removesuffix(".weight"), (torch.zeros(1, 1), torch.zeros(1, 1)))
        assert tensor.dtype == torch.bfloat16
        assert close_to(tensor, before[name].double() + 1.5 * (B @ A)) < 2**-8
    expected = {**read_json(case.base / "config.json"), "dtype": "bfloat16"}
    assert read_json(tmp_path / "merged" / "config.json") == expected
    assert load_all(tmp_path / "merged", type(case.model)).dtype == torch.bfloat16


def test_what_a_class_keeps_in_float32_stays_so_when_float16_is_requested(make: Make, tmp_path: Path) -> None:
    """T5 keeps the output projection of its feed-forward in float32 beside float16."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "wo"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merge(base=str(tmp_path / "base"), adapter=tmp_path / "adapter", output=tmp_path / "merged", dtype="float16")
    dtypes = {name: tensor.dtype for name, tensor in read_tensors(tmp_path / "merged").items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if name.endswith(".wo.weight")}
    assert len(kept) == 4


def test_names_of_another_era_on_disk_are_kept(make: Make, tmp_path: Path) -> None:
    """A BERT whose checkpoint lacks the prefix of the class, and calls LayerNorm's weight gamma."""
    case = make("bert", task_type=None, target_modules=["query", "dense"])
    expected = case.in_memory()
    path = case.base / "model.safetensors"
    old = {
        name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"): tensor
        for name, tensor in read_tensors(case.base).items()
    }
    save_file(old, path, metadata={"format": "pt"})
    result = merge_case(case, tmp_path / "merged")
    assert "encoder.layer.0.attention.self.query.weight" in result.merged
    assert read_tensors(tmp_path / "merged").keys() == old.keys()
    assert any("gamma" in name for name in old)
    assert close_to(logits(load_all(tmp_path / "merged", type(case.model))), logits(expected)) < 1e-5


def test_names_that_differ_between_checkpoint_and_model_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Llava: `language_model.model.layers` on disk is `model.language_model.layers` in the model."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=pico.config("llama"), image_token_index=259)
    cls = transformers.LlavaForConditionalGeneration
    cls(config).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        cls.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj", "fc1"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    result = merge(base=str(tmp_path / "base"), adapter=tmp_path / "adapter", output=tmp_path / "merged")
    assert read_tensors(tmp_path / "merged").keys() == read_tensors(tmp_path / "base").keys()
    merged, expected = load_all(tmp_path / "merged", cls).state_dict(), adapted.merge_and_unload().state_dict()
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in result.merged
    assert not set(result.merged) & set(expected)
    assert all(close_to(merged[name], tensor) < FLOAT32 for name, tensor in expected.items() if tensor.any())


def test_tensors_that_the_class_does_not_use_are_copied_whatever_they_hold(make: Make, tmp_path: Path) -> None:
    case = make()
    tensors = {**read_tensors(case.base), "draft.head.weight": torch.full((3, 2), torch.nan)}
    save_file(tensors, case.base / "model.safetensors", metadata={"format": "pt"})
    merge_case(case, tmp_path / "merged")
    kept = read_tensors(tmp_path / "merged")["draft.head.weight"]
    assert torch.equal(kept.view(torch.uint8), tensors["draft.head.weight"].view(torch.uint8))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]},
    ],
    ids=["saved head", "adapted head", "saved norm and embedding"],
)
def test_whole_modules_of_the_adapter_replace_those_of_the_base(
    options: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    case = make(**options)
    result = merge_case(case, tmp_path / "merged")
    merged, expected = load_all(tmp_path / "merged", type(case.model)), case.in_memory()
    state, base = merged.state_dict(), case.model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert close_to(state[name], tensor) < FLOAT32, name
    names = ["lm_head.weight"] if "norm" not in str(options) else ["model.embed_tokens.weight", "model.norm.weight"]
    assert set(names) <= {*result.replaced, *result.merged}
    assert all(close_to(state[name], base[name]) > 0.01 for name in names)


def test_whole_modules_get_the_dtype_of_the_base(make: Make, tmp_path: Path) -> None:
    case = make("llama", {"dtype": torch.bfloat16}, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = changed(case.adapter, tmp_path / "float32", tensor=lambda name, value: (name, value.float() + 1e-4))
    merge_case(Case(case.base, case.model, adapter), tmp_path / "merged")
    saved = read_tensors(adapter)["base_model.model.lm_head.weight"]
    found = read_tensors(tmp_path / "merged")["lm_head.weight"]
    assert torch.equal(found, saved.bfloat16())
    assert not torch.equal(found.float(), saved)


def test_tied_weights_are_replaced_where_the_adapter_saves_all_of_them_alike(make: Make, tmp_path: Path) -> None:
    case = make("llama-tied", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    value = torch.randn(pico.VOCABULARY, 32)
    whole = changed(
        case.adapter, tmp_path / "alike", tensor=lambda name, old: (name, old if ".lora_" in name else value.clone())
    )
    result = merge_case(Case(case.base, case.model, whole), tmp_path / "merged")
    assert result.replaced == ["model.embed_tokens.weight"]
    merged = load_all(tmp_path / "merged", type(case.model))
    assert torch.equal(merged.lm_head.weight, value)
    assert torch.equal(merged.model.embed_tokens.weight, value)


def test_a_corrected_adapter_merged_is_the_base_with_that_adapter(run: Run, tmp_path: Path) -> None:
    result = merge(base=str(run.base), adapter=run.corrected, output=tmp_path / "merged")
    expected = on(type(run.model).from_pretrained(run.base), run.corrected)
    assert close_to(logits(load_all(tmp_path / "merged", type(run.model))), logits(expected)) < 1e-5
    assert f"corrected for {run.base}, and holds no hashes" in result.checked
    note = read_json(tmp_path / "merged" / "emloc-merge.json")
    assert note["adapter"]["corrected"] is True
    losses = [
        [one.loss for one in evaluate(base=str(base), adapters=adapters, data=run.data, device="cpu", max_length=32)]
        for base, adapters in ((tmp_path / "merged", []), (run.base, [run.corrected]))
    ]
    assert losses[0][0] == pytest.approx(losses[1][1], rel=1e-5)
