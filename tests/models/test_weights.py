"""Checkpoint tensors become the model's tensors exactly as transformers makes them, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from emloc_tools.errors import MismatchError, NumericalError, UnsupportedError
from emloc_tools.files.tensors import content_hash
from emloc_tools.models.base import BaseModel, open_base
from emloc_tools.models.layers import select_layers
from tests import pico
from tests.streaming.streamed import batches, checkpoint, in_memory, open_stream, outputs, stream_outputs


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a single-file checkpoint; `change` edits the dict or returns another."""
    tensors = checkpoint(folder)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(name: str) -> Any:
    """A change that takes a tensor away."""
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def assert_as_in_memory(opened: BaseModel, expected: Any) -> None:
    """Every parameter and persistent buffer equals that of the loaded model, dtype included."""
    weights = opened.weights()
    loaded = weights.load(weights.stored_names())
    state = expected.state_dict()
    assert weights.source_of.keys() == state.keys()
    for name, tensor in state.items():
        mine = loaded[weights.source_of[name]].to(dict(opened.model.state_dict())[name].dtype)
        assert mine.dtype == tensor.dtype, name
        assert torch.equal(mine, tensor), name
        dtype, shape = weights.stored_spec(weights.source_of[name])
        assert (dtype, shape) == (loaded[weights.source_of[name]].dtype, tuple(tensor.shape)), name


@pytest.mark.parametrize("family", list(pico.CLASSES))
def test_all_tensors_come_out_as_in_the_loaded_model(family: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path, family)
    assert_as_in_memory(open_base(str(tmp_path)), in_memory(tmp_path))


def test_experts_are_apart_on_disk_and_fused_in_the_model(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "qwen3-moe")
    stored = checkpoint(tmp_path)
    opened = open_base(str(tmp_path))
    weights = opened.weights()
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    assert fused not in stored
    expected = torch.stack(
        [
            torch.cat([stored[f"model.layers.1.mlp.experts.{i}.{part}_proj.weight"] for part in ("gate", "up")])
            for i in range(4)
        ]
    )
    read = opened.tensors.bytes_read
    assert torch.equal(weights.load([fused])[fused], expected)
    assert opened.tensors.bytes_read - read == expected.nbytes
    assert weights.stored_spec(fused) == (torch.float32, tuple(expected.shape))


def test_names_of_another_era_are_converted(tmp_path: Path) -> None:
    """Old BERT checkpoints call the weight of a LayerNorm gamma and its bias beta."""
    pico.save_model(tmp_path, "bert")

    def age(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {name: next((name.replace(a, b) for a, b in old.items() if a in name), name) for name in tensors}
        assert any(name.endswith("gamma") for name in renamed.values())
        return {renamed[name]: tensor for name, tensor in tensors.items()}

    rewrite(tmp_path, age)
    assert_as_in_memory(open_base(str(tmp_path)), in_memory(tmp_path))


def test_a_checkpoint_without_the_prefix_of_the_class_is_read(tmp_path: Path) -> None:
    """BertModel saves `encoder...` where BertForMaskedLM calls it `bert.encoder...`."""
    model = pico.save_model(tmp_path, "bert")

    def strip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}

    rewrite(tmp_path, strip)
    expected = in_memory(tmp_path)
    assert torch.equal(
        expected.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight
    )
    assert_as_in_memory(open_base(str(tmp_path)), expected)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_resolve_to_the_one_that_is_stored(stored: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path, "llama-tied")
    rewrite(tmp_path, lambda tensors: tensors.update({stored: tensors.pop("model.embed_tokens.weight")}))
    opened = open_base(str(tmp_path))
    weights = opened.weights()
    assert weights.source_of["model.embed_tokens.weight"] == weights.source_of["lm_head.weight"]
    assert_as_in_memory(opened, in_memory(tmp_path))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_stored_share_one_tensor_only_if_they_are_equal(equal: bool, tmp_path: Path) -> None:
    pico.save_model(tmp_path, "llama-tied")

    def store_both(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if equal else -2)

    rewrite(tmp_path, store_both)
    expected = in_memory(tmp_path)
    assert torch.equal(expected.lm_head.weight, expected.model.embed_tokens.weight) == equal
    opened = open_base(str(tmp_path))
    assert_as_in_memory(opened, expected)
    assert (opened.model.lm_head.weight is opened.model.model.embed_tokens.weight) == equal  # type: ignore[union-attr]
    (streamed,) = stream_outputs(open_stream(tmp_path), batches()[:1])
    assert torch.equal(streamed[0], outputs(expected, batches()[0])[0])


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    rewrite(tmp_path, without("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(MismatchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not in the checkpoint"):
        open_base(str(tmp_path)).weights()


@pytest.mark.parametrize("parts", [["up"], ["gate", "up"]])
def test_a_missing_expert_is_refused_by_name(parts: list[str], tmp_path: Path) -> None:
    pico.save_model(tmp_path, "qwen3-moe")
    for part in parts:
        rewrite(tmp_path, without(f"model.layers.1.mlp.experts.2.{part}_proj.weight"))
    with pytest.raises(MismatchError, match=r"model\.layers\.1\.mlp\.experts"):
        open_base(str(tmp_path)).weights()


def test_a_wrong_shape_is_refused_by_name(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    weights = open_base(str(tmp_path)).weights()
    with pytest.raises(MismatchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has shape \[47, 32\]"):
        weights.load([name])
    with pytest.raises(MismatchError, match=r"up_proj\.weight"):
        stream_outputs(open_stream(tmp_path), batches())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused_by_name(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    pico.save_model(tmp_path, dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = bad

    weights = open_base(str(tmp_path)).weights()
    weights.load([name])  # control
    rewrite(tmp_path, damage)
    weights = open_base(str(tmp_path)).weights()
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        weights.load([name])


def test_weights_in_eight_bits_are_refused_even_if_the_configuration_hides_them(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    weights = open_base(str(tmp_path)).weights()
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight is stored in torch\.float8_e4m3fn"):
        weights.load([name])


def test_unused_tensors_are_listed_and_never_read(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    used = sum(tensor.nbytes for tensor in checkpoint(tmp_path).values())
    extra = {
        "vision.patch.weight": torch.full((5, 5), torch.nan),
        "model.layers.9.mlp.up_proj.weight": torch.ones(48, 32),
    }
    rewrite(tmp_path, lambda tensors: tensors.update(extra))
    stream = open_stream(tmp_path)
    assert sorted(stream.weights.ignored) == sorted(extra)
    stream_outputs(stream, batches()[:1])
    assert stream.weights.tensors.bytes_read == used


def test_hashes_are_those_of_the_stored_tensors_and_collected_as_they_are_loaded(tmp_path: Path) -> None:
    pico.save_model(tmp_path, dtype=torch.bfloat16)
    opened = open_base(str(tmp_path), dtype="float32")  # computing in another dtype does not change what is hashed
    layers = select_layers(opened.model)
    weights = opened.weights(layers)
    assert weights.hashes == {}
    names = [f"{layer.name}.weight" for layer in layers]
    weights.load(names[:2])
    assert weights.hashes == {name: content_hash(checkpoint(tmp_path)[name]) for name in names[:2]}


def test_modules_that_a_class_keeps_in_float32_are_so_here(tmp_path: Path) -> None:
    """T5 keeps the output projection of its feed-forward in float32 beside fp16, but not beside bf16."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        expected = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        opened = open_base(str(tmp_path), dtype=name)
        assert {n: p.dtype for n, p in opened.model.named_parameters()} == {
            n: p.dtype for n, p in expected.named_parameters()
        }
        kept = {n for n, p in expected.named_parameters() if p.dtype == torch.float32}
        assert bool(kept) == (dtype == torch.float16)
        assert_as_in_memory(opened, expected)


def test_a_damaged_index_names_the_tensor(tmp_path: Path) -> None:
    pico.save_model(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"model\.norm\.weight"):
        stream_outputs(open_stream(tmp_path), batches())
