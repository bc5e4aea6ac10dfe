"""What fit-head refuses, each with a line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emloc_tools.errors import EmlocError, InputError, MismatchError, UnsupportedError
from emloc_tools.stages.fit_head import fit_head
from tests import pico
from tests.stages import classifiers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pico.save_model(folder, "llama")
    return folder


def refused(base: Path, data: Path, kind: type[EmlocError], message: str, **options: Any) -> None:
    output = data.parent / "out"
    with pytest.raises(kind, match=message):
        fit_head(base=str(base), data=data, output=output, **{"device": "cpu", **options})
    assert not output.exists()


def test_a_base_with_a_head_is_a_base_already(tmp_path: Path, base: Path) -> None:
    data = classifiers.save_labelled(tmp_path / "data.jsonl", 6)
    fit_head(base=str(base), data=data, output=tmp_path / "headed", held_out=0, device="cpu")
    message = "has every tensor of LlamaForSequenceClassification, so it has a head already; pass it as --base"
    refused(tmp_path / "headed", data, InputError, message)


def test_a_checkpoint_that_lacks_more_than_a_head_is_damaged(tmp_path: Path, base: Path) -> None:
    (tmp_path / "damaged").mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "damaged" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    data = classifiers.save_labelled(tmp_path / "data.jsonl", 6)
    refused(
        tmp_path / "damaged", data, MismatchError, r"model\.layers\.1\.mlp\.up_proj\.weight is not in the checkpoint"
    )


def test_a_kind_of_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    data = classifiers.save_labelled(tmp_path / "data.jsonl", 6)
    message = "transformers has no model for sequence classification of the type vit"
    refused(tmp_path / "vit", data, UnsupportedError, message)


def test_a_head_that_averages_tokens_is_refused(tmp_path: Path) -> None:
    classifiers.save_base(tmp_path / "base", "modernbert-body")
    data = classifiers.save_labelled(tmp_path / "data.jsonl", 6)
    message = "the head of ModernBertForSequenceClassification does more than read one token of each sample"
    refused(tmp_path / "base", data, UnsupportedError, message)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a"], "the data hold only the label a; a head needs two or more"),
        (["a", None], r"data\.jsonl: `label` is None, expected a text or a whole number"),
        (["a", 0.5], r"data\.jsonl: `label` is 0\.5, expected a text or a whole number"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, base: Path, labels: list[Any], message: str
) -> None:
    records = [{"text": "some text", "label": label} for label in labels]
    refused(base, pico.write_jsonl(tmp_path / "data.jsonl", records), InputError, message)


def test_a_record_without_a_label_is_named(tmp_path: Path, base: Path) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "a", "label": "x"}, {"text": "b"}])
    refused(base, data, InputError, r"data\.jsonl:2: found the keys \['text'\], expected `text` and `label`")


def test_a_label_of_which_no_sample_is_chosen_is_named(tmp_path: Path, base: Path) -> None:
    records = [{"text": "a", "label": "x"}] * 40 + [{"text": "b", "label": "y"}]
    data = pico.write_jsonl(tmp_path / "data.jsonl", records)
    refused(base, data, InputError, r"none of the 2 chosen samples has the label 'y'; choose more --samples", samples=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1.0}, "--held-out 1 is outside 0"),
        ({"held_out": -0.1}, r"--held-out -0\.1 is outside 0"),
        ({"weight_decay": -1.0}, "--weight-decay -1 must be 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, base: Path, options: Any, message: str) -> None:
    refused(base, classifiers.save_labelled(tmp_path / "data.jsonl", 6), InputError, message, **options)


def test_a_vocabulary_of_no_padding_and_no_end_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", "gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    data = classifiers.save_labelled(tmp_path / "data.jsonl", 6)
    refused(tmp_path / "base", data, InputError, "names a padding or an end token, .* add pad_token_id to config")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "pad_token_id": 5}))
    assert fit_head(base=str(tmp_path / "base"), data=data, output=tmp_path / "out", device="cpu").pad == 5


def test_half_a_head_is_damage(tmp_path: Path) -> None:
    classifiers.save_base(tmp_path / "base", "bert")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["classifier.bias"] = torch.zeros(2)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    records = [{"text": f"some text {number}", "label": number % 2} for number in range(6)]
    data = pico.write_jsonl(tmp_path / "data.jsonl", records)
    refused(tmp_path / "base", data, MismatchError, "the checkpoint holds only bias of classifier")
