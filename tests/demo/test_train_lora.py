"""The demo's training script: it learns from the same tokens as the stages measure, though it shares no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors

from emloc_tools.data.batches import load_batches
from emloc_tools.demo.train_lora import encode
from emloc_tools.models.source import Source, open_source
from tests import pico

USER, ASSISTANT = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so it is"}
RECORDS: dict[str, dict[str, Any]] = {
    "text": {"text": "a few words"},
    "messages": {"messages": [USER, ASSISTANT]},
    "strings": {"prompt": "one and one is ", "completion": "two"},
    "an empty prompt": {"prompt": "", "completion": "two"},
    "lists": {"prompt": [USER], "completion": [ASSISTANT]},
    "a longer conversation": {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
    "everything": {"text": "not this", "prompt": "this ", "completion": "counts"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model whose tokenizer puts `<s>` before every text, so that it matters where special tokens are added."""
    folder = tmp_path_factory.mktemp("model")
    pico.save_model(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return open_source(str(folder))


def measured(record: dict[str, Any], source: Source, path: Path, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels as `evaluate` and `calibrate` have them."""
    data = pico.write_jsonl(path, [record])
    (batch,) = load_batches(data, source, samples=None, max_length=max_length, batch_size=1, seed=0)
    ids = batch.inputs["input_ids"][0]
    assert batch.targets is not None
    return ids.tolist(), torch.where(batch.targets[0], ids, -100).tolist()


@pytest.mark.parametrize("max_length", [100, 20])
@pytest.mark.parametrize("kind", RECORDS)
def test_tokens_and_labels_are_those_of_the_stages(kind: str, max_length: int, source: Source, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder)
    found = encode(RECORDS[kind], tokenizer, max_length)
    ids, labels = measured(RECORDS[kind], source, tmp_path / "data.jsonl", max_length)
    assert (found["input_ids"], found["labels"]) == (ids, labels)
    assert found["attention_mask"] == [1] * len(ids)


def test_of_a_conversation_only_the_answer_is_learnt(source: Source) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder)
    found = encode(RECORDS["lists"], tokenizer, 100)
    assert tokenizer.decode(found["input_ids"]) == "<s>user: why?</s><s>assistant: so it is</s>"
    assert tokenizer.decode([label for label in found["labels"] if label != -100]) == "so it is</s>"
    # Control: without what asks for the answer, its heading would be learnt, too.
    prompt = tokenizer.apply_chat_template([USER], tokenize=False)
    rest = found["input_ids"][len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) :]
    assert tokenizer.decode(rest) == "<s>assistant: so it is</s>"


def test_the_script_trains_on_conversations(source: Source, tmp_path: Path) -> None:
    """Both layers' B leave zero, where PEFT starts it, and the figures are those of the run."""
    from safetensors.torch import load_file

    from emloc_tools.demo.train_lora import main

    data = pico.write_jsonl(tmp_path / "data.jsonl", [RECORDS["lists"], RECORDS["messages"], RECORDS["strings"]])
    options = ["--model", str(source.folder), "--data", str(data), "--output", str(tmp_path / "lora"), "--steps", "2"]
    main(options)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    trained = [value for name, value in tensors.items() if "lora_B" in name]
    assert len(trained) == 7 * pico.LLAMA["num_hidden_layers"]
    assert all(value.abs().max() > 0 for value in trained)
    figures = json.loads((tmp_path / "lora" / "training.json").read_text())
    assert figures["steps"] == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(source.folder)
    assert figures["model_parameters"] == sum(weight.numel() for weight in model.parameters())
