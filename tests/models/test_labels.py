"""Records with a label: ids come from the model's own names, and batches are what its trainer would make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools.data.batches import Batch, load_batches, read_labels
from emloc_tools.errors import InputError
from emloc_tools.models.labels import numbered
from emloc_tools.models.source import open_source
from tests import pico

LABELS = {"no": 0, "yes": 1, "7": 2}


def base(folder: Path, *, architecture: str = "BertForSequenceClassification", **fields: Any) -> Path:
    """The configuration and tokenizer of a classifier, which is all that data need; it joins pairs as BERT does."""
    from tokenizers import processors

    config = pico.config("bert").to_dict()
    names = {"label2id": LABELS, "id2label": {str(number): name for name, number in LABELS.items()}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **names, "architectures": [architecture], **fields}))
    pico.save_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, records: list[Any], **options: Any) -> list[Batch]:
    path = pico.write_jsonl(folder.parent / "data.jsonl", records)
    options = {"samples": None, "max_length": None, "batch_size": len(records), "seed": 0, **options}
    return load_batches(path, open_source(str(folder)), **options)


def test_a_label_is_a_name_or_an_id_and_a_name_comes_first(tmp_path: Path) -> None:
    records = [{"text": "a", "label": label} for label in ("yes", "no", 1, 7, 2, "7")]
    (batch,) = load(base(tmp_path / "base"), records)
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 1, 2, 2, 2]
    assert batch.targets is not None
    assert not batch.targets.any(), "no token of a classifier is predicted"


@pytest.mark.parametrize("label", ["maybe", 3, True, None, 1.0, ["yes"]])
def test_an_unknown_label_names_the_line_and_the_known_ones(tmp_path: Path, label: Any) -> None:
    records = [{"text": "a", "label": "yes"}, {"text": "b", "label": label}]
    with pytest.raises(InputError, match=r"data\.jsonl:2: `label` is .*, expected one of 'no', 'yes', '7'"):
        load(base(tmp_path / "base"), records)


def test_a_record_without_a_label_among_others_is_a_mistake(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    with pytest.raises(InputError, match=r"data\.jsonl:2: has no `label`, although other records have one"):
        load(folder, [{"text": "a", "label": "yes"}, {"text": "b"}])
    (batch,) = load(folder, [{"text": "a"}, {"text": "b"}])
    assert batch.labels is None
    with pytest.raises(InputError, match=r"data\.jsonl:1: found the keys \['label', 'prompt'\], expected `text` and"):
        load(folder, [{"prompt": "a", "label": "yes"}])


def test_pairs_are_joined_cut_and_typed_as_the_tokenizer_does_for_a_trainer(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    texts = [("one two three", "four"), ("five", "six seven"), ("eight", None)]
    records = [{"text": a, **({"text_pair": b} if b else {}), "label": 0} for a, b in texts]
    (batch,) = load(folder, records, max_length=14)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = [tokenizer(a, b, truncation=True, max_length=14, return_token_type_ids=True) for a, b in texts]
    expected = tokenizer.pad(encoded, return_tensors="pt")
    assert torch.equal(batch.inputs["input_ids"], expected["input_ids"])
    assert torch.equal(batch.inputs["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch.inputs["token_type_ids"], expected["token_type_ids"])
    assert expected["token_type_ids"].any()
    assert len(tokenizer(*texts[0])["input_ids"]) > 14, "something is cut"
    assert all(row["input_ids"][-1] == 2 for row in encoded), "and the special token at the end stays"


def test_models_that_do_not_read_the_types_of_tokens_get_none(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", type_vocab_size=1)
    (batch,) = load(folder, [{"text": "a", "text_pair": "b", "label": 0}, {"text": "cd", "label": 1}])
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_padding_is_what_the_model_takes_for_padding(tmp_path: Path) -> None:
    """Decoders look for the last token that is not the configuration's padding."""
    folder = base(tmp_path / "base", pad_token_id=3)
    (batch,) = load(folder, [{"text": "a", "label": 0}, {"text": "bcd", "label": 1}])
    assert batch.inputs["input_ids"][0, 3:].tolist() == [3, 3]
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token_id == 0


@pytest.mark.parametrize(
    "fields",
    [{"problem_type": "multi_label_classification"}, {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}],
)
def test_models_that_do_not_give_one_label_take_texts_alone(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = base(tmp_path / "base", **fields)
    message = r"data\.jsonl:1: has a `label`, but by its config\.json the model gives a number, or several labels"
    with pytest.raises(InputError, match=message):
        load(folder, [{"text": "a", "label": 0}])
    (batch,) = load(folder, [{"text": "a"}])
    assert batch.labels is None


def test_other_models_take_a_label_for_any_other_field(tmp_path: Path) -> None:
    """The control: a language model's text is all target, whatever else stands in the record."""
    folder = base(tmp_path / "base", architecture="BertForMaskedLM")
    (batch,) = load(folder, [{"text": "a", "label": "unheard of"}])
    assert batch.labels is None
    assert batch.targets is not None
    assert batch.targets.all()


def test_labels_are_numbered_in_order_as_numbers_where_all_are() -> None:
    assert numbered([10, 9, 10, 2]) == {"2": 0, "9": 1, "10": 2}
    assert numbered(["10", "9", "2"]) == {"10": 0, "2": 1, "9": 2}
    with pytest.raises(InputError, match="hold only the label x"):
        numbered(["x", "x"])
    with pytest.raises(ValueError, match=r"`label` is 0\.5, expected a text or a whole number"):
        numbered([1, 0.5])


def test_labels_are_read_as_they_stand(tmp_path: Path) -> None:
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"label": 1}, {"label": "x"}])
    assert read_labels(path) == [1, "x"]
    pico.write_jsonl(path, [{"label": 1}, {"text": "x"}])
    with pytest.raises(InputError, match=r"data\.jsonl:2: found the keys \['text'\], expected `text` and `label`"):
        read_labels(path)
