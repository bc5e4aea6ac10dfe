"""merge: how the folder comes about and what is in it beside the weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools.files.tensors import TensorFolder
from tests.stages.merging import Make, make_case, merge_case
from tests.stages.reference import contents, read_json, read_tensors


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A base of a family and a LoRA on it, in the test's folder."""
    return functools.partial(make_case, tmp_path)


def test_every_weight_is_read_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("llama", {"max_shard_size": "50KB"})
    read: list[str] = []
    original = TensorFolder.read

    def counted(self: TensorFolder, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        if "base_model" not in name:
            read.append(name)
        return original(self, name, buffer)

    monkeypatch.setattr(TensorFolder, "read", counted)
    merge_case(case, tmp_path / "merged")
    placed = read_json(case.base / "model.safetensors.index.json")["weight_map"]
    assert sorted(read) == sorted(placed)
    files = [placed[name] for name in read]
    assert files == sorted(files)  # one shard after the other
    assert len(set(files)) > 2


def test_configuration_tokenizer_and_provenance(make: Make, tmp_path: Path) -> None:
    case = make()
    (case.base / "config.json").write_text(json.dumps(read_json(case.base / "config.json"), indent=7))
    result = merge_case(case, tmp_path / "merged", command="merge it")
    merged = tmp_path / "merged"
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (merged / name).read_bytes() == (case.base / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    assert (
        tokenizer("some words")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(case.base)("some words").input_ids
    )
    note = read_json(merged / "emloc-merge.json")
    assert note["base"] == {"id": str(case.base), "revision": None, "architecture": "LlamaForCausalLM"}
    assert note["made_by"]["command"] == "merge it"
    assert (note["emulator"], note["interpolate"], note["adapter"]["corrected"]) == (None, None, False)
    assert note["merged"] == result.merged
    assert note["checked"] == result.checked
    card = (merged / "README.md").read_text()
    assert f"base_model: {case.base}" in card
    assert f"{len(result.merged)} of its {len(result.merged) + result.copied} tensors differ" in card
    assert result.nbytes == sum(tensor.nbytes for tensor in read_tensors(case.base).values())


def test_merging_gives_the_same_bytes_again_and_leaves_its_inputs(make: Make, tmp_path: Path) -> None:
    case = make()
    before = contents(case.base), contents(case.adapter)
    for name in ("a", "b"):
        merge_case(case, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (contents(case.base), contents(case.adapter)) == before


def test_our_own_folder_is_replaced_where_that_is_asked_for(make: Make, tmp_path: Path) -> None:
    case = make()
    merge_case(case, tmp_path / "merged")
    single = contents(tmp_path / "merged")
    merge_case(case, tmp_path / "merged", overwrite=True, max_shard_size=50_000)
    assert "model.safetensors" in single
    assert "model.safetensors" not in contents(tmp_path / "merged")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_merge_leaves_nothing(make: Make, tmp_path: Path, error: type[BaseException]) -> None:
    case = make()
    before = set(tmp_path.iterdir())

    def stop(step: Any) -> None:
        if step.done == 3:
            assert set(tmp_path.iterdir()) != before, "it must be at work"
            raise error("stop")

    with pytest.raises(error):
        merge_case(case, tmp_path / "merged", progress=stop)
    assert set(tmp_path.iterdir()) == before
