"""The folder that fit-head writes: stock transformers loads it whole, and it shares the base's files."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools.errors import InputError
from emloc_tools.stages.fit_head import FittedHead, fit_head
from emloc_tools.stages.inspect import inspect
from tests import pico
from tests.stages import classifiers
from tests.stages.classifiers import classifier, labelled, last_rows, logits_of
from tests.stages.reference import close_to, contents, read_json, read_tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifiers.save_labelled(tmp_path_factory.mktemp("data") / "labelled.jsonl", 9)


def fit(base: Path, data: Path, output: Path, **options: Any) -> FittedHead:
    settings = {"held_out": 0, "weight_decay": 0.1, "device": "cpu", "batch_size": 3, **options}
    return fit_head(base=str(base), data=data, output=output, **settings)


def loading(folder: Path) -> dict[str, Any]:
    """What stock transformers reports of a load: missing, unexpected and mismatched keys."""
    cls = transformers.AutoModelForSequenceClassification
    return cls.from_pretrained(folder, output_loading_info=True)[1]  # type: ignore[no-any-return]


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_stock_transformers_misses_nothing_and_only_warns_of_the_old_head(tmp_path: Path, data: Path) -> None:
    pico.save_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    result = fit(tmp_path / "base", data, tmp_path / "out")
    found = loading(tmp_path / "out")
    assert (found["missing_keys"], found["mismatched_keys"]) == (set(), set())
    assert found["unexpected_keys"] == {"lm_head.weight"}
    assert "score.weight" in loading(tmp_path / "base")["missing_keys"], "the control: the base has no head"
    samples, _ = labelled(data, tmp_path / "base", 100)
    weight = read_tensors(tmp_path / "out")["score.weight"]
    assert weight.dtype == torch.bfloat16, "the head has the model's own precision"
    with torch.no_grad():
        logits = logits_of(classifier(tmp_path / "out"), samples)
    assert close_to(logits, last_rows(tmp_path / "base", samples) @ weight.double().T) < 1e-6
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["LlamaForSequenceClassification"]
    assert config.num_labels == 3
    assert config.label2id == result.labels == {"ham": 0, "neither": 1, "spam": 2}
    assert {number: name for name, number in config.label2id.items()} == config.id2label


def test_the_base_is_linked_file_by_file_and_the_head_is_a_file_of_its_own(tmp_path: Path, data: Path) -> None:
    pico.save_model(tmp_path / "base", "llama", max_shard_size="40KB")
    before = contents(tmp_path / "base")
    shards = len(list((tmp_path / "base").glob("*.safetensors")))
    assert shards > 1
    result = fit(tmp_path / "base", data, tmp_path / "out")
    assert (result.shards.linked, result.shards.copied, result.shards.written) == (shards, 0, 1)
    assert len(inodes(tmp_path / "base") & inodes(tmp_path / "out")) == shards
    assert contents(tmp_path / "base") == before
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    stored = read_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert loading(tmp_path / "out")["missing_keys"] == set()


def test_where_no_links_can_be_made_files_are_copied(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.save_model(tmp_path / "base", "gpt2")
    linked = fit(tmp_path / "base", data, tmp_path / "linked")

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    copied = fit(tmp_path / "base", data, tmp_path / "copied")
    assert (linked.shards.linked, copied.shards.linked, copied.shards.copied) == (1, 0, 1)
    assert inodes(tmp_path / "base") & inodes(tmp_path / "linked")
    assert not inodes(tmp_path / "base") & inodes(tmp_path / "copied")
    first, second = contents(tmp_path / "linked"), contents(tmp_path / "copied")
    same = [name for name in first if name.endswith((".safetensors", "config.json", "index.json"))]
    assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_a_link_in_a_cache_is_followed(tmp_path: Path, data: Path) -> None:
    """The Hub's cache holds links to blobs; a hard link to such a link would break with the cache."""
    pico.save_model(tmp_path / "base", "gpt2")
    blob = tmp_path / "blob"
    (tmp_path / "base" / "model.safetensors").rename(blob)
    (tmp_path / "base" / "model.safetensors").symlink_to(blob)
    fit(tmp_path / "base", data, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert blob.stat().st_ino in inodes(tmp_path / "out")


def test_a_body_saved_alone_is_written_under_the_names_of_the_classifier(tmp_path: Path, data: Path) -> None:
    classifiers.save_base(tmp_path / "base", "llama-body")
    body = read_tensors(tmp_path / "base")
    assert "layers.0.mlp.up_proj.weight" in body
    fit(tmp_path / "base", data, tmp_path / "out")
    found = loading(tmp_path / "out")
    assert (found["missing_keys"], found["unexpected_keys"]) == (set(), set())
    stored = read_tensors(tmp_path / "out")
    assert stored.keys() == {"score.weight", *(f"model.{name}" for name in body)}
    assert all(torch.equal(stored[f"model.{name}"], tensor) for name, tensor in body.items())


def test_a_model_without_a_padding_token_gets_the_tokenizers(tmp_path: Path, data: Path) -> None:
    """Without one, decoders refuse batches. A tokenizer that has none lends its end token, and the result says so."""
    pico.save_model(tmp_path / "base", "gpt2")
    assert read_json(tmp_path / "base" / "config.json").get("pad_token_id") is None
    result = fit(tmp_path / "base", data, tmp_path / "out")
    assert (result.pad, result.pads) == (0, True)
    assert read_json(tmp_path / "out" / "config.json")["pad_token_id"] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    result = fit(tmp_path / "base", data, tmp_path / "other")
    assert (result.pad, result.pads) == (2, False)
    heads = [read_tensors(tmp_path / name)["score.weight"] for name in ("out", "other")]
    assert close_to(heads[1], heads[0]) < 1e-5, "what fills up short texts does not matter"


def test_overwrite_replaces_the_folder_and_leaves_the_base(tmp_path: Path, data: Path) -> None:
    pico.save_model(tmp_path / "base", "gpt2")
    before = contents(tmp_path / "base")
    fit(tmp_path / "base", data, tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        fit(tmp_path / "base", data, tmp_path / "out")
    fit(tmp_path / "base", data, tmp_path / "out", overwrite=True, weight_decay=10)
    assert read_json(tmp_path / "out" / "emloc-head.json")["weight_decay"] == 10
    shutil.rmtree(tmp_path / "out")
    assert contents(tmp_path / "base") == before


def test_the_note_says_what_the_head_was_made_from(tmp_path: Path, data: Path) -> None:
    pico.save_model(tmp_path / "base", "gpt2")
    result = fit(tmp_path / "base", data, tmp_path / "out", held_out=0.4, command="emloc-tools fit-head …")
    note = read_json(tmp_path / "out" / "emloc-head.json")
    assert note["made_by"]["command"] == "emloc-tools fit-head …"
    assert note["base"] == {"id": str(tmp_path / "base"), "revision": None, "architecture": "GPT2LMHeadModel"}
    assert note["head"] == ["score.weight"]
    assert note["data"]["samples"] == 9
    assert result.after is not None
    assert note["after"]["accuracy"] == result.after.accuracy


def test_inspect_shows_the_labels_the_head_and_what_it_is_worth(tmp_path: Path, data: Path) -> None:
    pico.save_model(tmp_path / "base", "gpt2")
    result = fit(tmp_path / "base", data, tmp_path / "out", held_out=0.4, command="emloc-tools fit-head …")
    assert result.after is not None
    found = inspect(tmp_path / "out")
    assert found.kind == "base with a head"
    assert found.facts == {
        "base": str(tmp_path / "base"),
        "architecture": "GPT2LMHeadModel",
        "classifier": "GPT2ForSequenceClassification",
        "labels": ["ham", "neither", "spam"],
        "head": ["score.weight"],
        "weight_decay": 0.1,
        "fitted_samples": 6,
        "held_out_samples": 3,
        "loss": result.after.loss,
        "accuracy": result.after.accuracy,
        "made_by": "emloc-tools fit-head …",
    }
    (tmp_path / "out" / "emloc-head.json").write_text("{}")
    with pytest.raises(InputError, match=r"emloc-head\.json is not what fit-head writes"):
        inspect(tmp_path / "out")
