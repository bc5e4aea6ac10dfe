"""Data files become batches of token ids, masks and targets, and every fault is reported with file and line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools.data.batches import Batch, count_samples, count_tokens, load_batches
from emloc_tools.errors import InputError
from emloc_tools.models.source import Source, open_source
from tests import pico

POSITIONS = pico.LLAMA["max_position_embeddings"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A Llama of 128 positions and 260 tokens, one for each byte and four special ones."""
    folder = tmp_path_factory.mktemp("model")
    pico.save_model(folder)
    return open_source(str(folder))


def load(path: Path, source: Source, **options: Any) -> list[Batch]:
    """`load_batches` with one sample a batch and no cut, unless told otherwise."""
    return load_batches(path, source, **{"samples": None, "max_length": None, "batch_size": 1, "seed": 0, **options})


def ids(text: str) -> list[int]:
    """The token ids of printable ASCII text. Its vocabulary: four special tokens, then the byte-level alphabet.

    That is 188 printable bytes beginning with `!`, then the others, of which the space, byte 32, is the 33rd.
    """
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    found: list[int] = []
    while text:
        name = next((name for name in special if text.startswith(name)), text[0])
        byte = 188 + 32 if name == " " else ord(name[0]) - ord("!")
        found.append(special.get(name, len(special) + 1 + byte))
        text = text[len(name) :]
    return found


def rows(batches: list[Batch]) -> list[list[int]]:
    """The real token ids of every sample."""
    found = []
    for batch in batches:
        mask = batch.mask if batch.mask is not None else torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool)
        found += [row[keep].tolist() for row, keep in zip(batch.inputs["input_ids"], mask, strict=True)]
    return found


def targets(batch: Batch) -> list[int]:
    """The token ids of a batch of one sample that count in a loss."""
    assert batch.targets is not None
    found: list[int] = batch.inputs["input_ids"][batch.targets].tolist()
    return found


CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_texts_become_their_tokens_and_all_of_them_are_targets(source: Source, tmp_path: Path) -> None:
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "one two"}, {"text": "three", "other": 1}])
    first, second = load(path, source)
    assert rows([first, second]) == [ids("one two"), ids("three")]
    assert targets(first) == ids("one two")
    assert first.mask is None
    assert "attention_mask" not in first.inputs


def test_messages_go_through_the_chat_template_without_further_special_tokens(source: Source, tmp_path: Path) -> None:
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"messages": CONVERSATION}])
    (batch,) = load(path, source)
    assert rows([batch]) == [ids("<s>user: hi</s><s>assistant: ho</s>")]
    assert targets(batch) == rows([batch])[0]


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "ab ", "completion": "cde"}, "ab ", "cde"),
        ({"prompt": "", "completion": "cde"}, "", "cde"),
        ({"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}, "<s>user: hi</s><s>assistant: ", "ho</s>"),
    ],
)
def test_only_the_completion_of_a_prompt_is_a_target(
    record: dict[str, Any], prompt: str, completion: str, source: Source, tmp_path: Path
) -> None:
    (batch,) = load(pico.write_jsonl(tmp_path / "data.jsonl", [record]), source)
    assert rows([batch]) == [ids(prompt + completion)]
    assert targets(batch) == ids(completion)


def test_a_token_that_joins_prompt_and_completion_is_a_target(tmp_path: Path) -> None:
    """Tokenising a prompt alone may end in another token than the whole text has there."""
    from tokenizers import Tokenizer, models

    pico.save_model(tmp_path)
    vocabulary = {"<pad>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"prompt": "ca", "completion": "bc"}])
    (batch,) = load(path, open_source(str(tmp_path)))
    assert batch.inputs["input_ids"].tolist() == [[3, 4, 3]]
    assert targets(batch) == [4, 3]


def test_a_special_token_at_the_start_is_added_to_prompt_and_text_but_not_to_chats(
    source: Source, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, processors

    pico.save_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    records = [{"text": "x"}, {"prompt": "ab", "completion": "c"}, {"messages": CONVERSATION[:1]}]
    batches = load(pico.write_jsonl(tmp_path / "data.jsonl", records), open_source(str(tmp_path)))
    assert rows(batches) == [ids("<s>x"), ids("<s>abc"), ids("<s>user: hi</s>")]
    assert targets(batches[1]) == ids("c")


def test_samples_are_chosen_by_seed_and_stay_in_file_order(source: Source, tmp_path: Path) -> None:
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": f"sample {number:02d}"} for number in range(20)])
    every = rows(load(path, source))
    chosen = rows(load(path, source, samples=5, seed=3))
    assert chosen == rows(load(path, source, samples=5, seed=3))
    places = [every.index(row) for row in chosen]
    assert places == sorted(random.Random(3).sample(range(20), 5))
    assert chosen != rows(load(path, source, samples=5, seed=4))
    assert rows(load(path, source, samples=20)) == rows(load(path, source, samples=99)) == every


def test_texts_are_cut_at_max_length(source: Source, tmp_path: Path) -> None:
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "abcdef"}, {"prompt": "abcd", "completion": "ef"}])
    batches = load(path, source, max_length=5)
    assert rows(batches) == [ids("abcde")] * 2
    assert [targets(batch) for batch in batches] == [ids("abcde"), ids("e")]
    assert targets(load(path, source, max_length=3)[1]) == []


def test_texts_are_cut_at_the_positions_that_the_model_has(source: Source, tmp_path: Path) -> None:
    text = "ab" * POSITIONS
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": text}])
    for max_length in (None, 2048, POSITIONS):
        assert rows(load(path, source, max_length=max_length)) == [ids(text[:POSITIONS])]
    # Control: one token more, and a model with learned positions fails.
    pico.save_model(tmp_path / "gpt2", "gpt2")
    (batch,) = load(path, open_source(str(tmp_path / "gpt2")))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    assert model(**batch.inputs).logits.shape[1] == POSITIONS
    with pytest.raises(IndexError):
        model(input_ids=torch.zeros(1, POSITIONS + 1, dtype=torch.long))


def test_a_model_that_keeps_positions_for_padding_says_so_in_its_tokenizer(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**{**pico.BERT, "max_position_embeddings": 34}, pad_token_id=1)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    pico.save_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 32}))
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "z" * 60}])
    (batch,) = load(path, open_source(str(tmp_path)))
    assert batch.inputs["input_ids"].shape == (1, 32)
    transformers.RobertaForMaskedLM.from_pretrained(tmp_path)(**batch.inputs)


def test_batches_are_padded_on_the_right_and_masked(source: Source, tmp_path: Path) -> None:
    texts = ["abc", "a", "ab", "abcd", "x"]
    batches = load(pico.write_jsonl(tmp_path / "data.jsonl", [{"text": t} for t in texts]), source, batch_size=2)
    assert [batch.inputs["input_ids"].shape for batch in batches] == [(2, 3), (2, 4), (1, 1)]
    first = batches[0]
    assert first.inputs["input_ids"].tolist() == [ids("abc"), [*ids("a"), 0, 0]]
    assert first.mask is not None
    assert first.mask.tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(first.inputs["attention_mask"], first.mask.long())
    assert torch.equal(first.targets, first.mask)  # type: ignore[arg-type]
    assert batches[2].mask is None
    assert rows(batches) == [ids(text) for text in texts]
    assert (count_samples(batches), count_tokens(batches)) == (5, sum(map(len, texts)))


def test_blank_lines_are_skipped_and_still_counted(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n   \n{"text": "b"}\n\nbroken')
    with pytest.raises(InputError, match=r"data\.jsonl:6: not JSON"):
        load(path, source)
    path.write_bytes(path.read_bytes().removesuffix(b"broken"))
    assert rows(load(path, source)) == [ids("a"), ids("b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "list found, expected a JSON object"),
        (b'"text"', "str found, expected a JSON object"),
        (b'{"txt": "a"}', r"found the keys \['txt'\], expected `text`, `messages`, or `prompt` and `completion`"),
        (b'{"prompt": "a"}', r"found the keys \['prompt'\]"),
        (b'{"text": 3}', "`text` is int, expected a string"),
        (b'{"text": null}', "`text` is NoneType, expected a string"),
        (b'{"prompt": "a", "completion": [1]}', "`completion` is list, expected a string"),
        (b'{"prompt": [], "completion": []}', "`messages` must be a list of at least one message"),
        (b'{"messages": "hi"}', "`messages` must be a list of at least one message"),
        (b'{"messages": []}', "`messages` must be a list of at least one message"),
        (b'{"messages": ["hi"]}', "every message must be an object with a `role`"),
        (b'{"messages": [{"content": "hi"}]}', "every message must be an object with a `role`"),
        (b'{"text": ""}', "the text is empty"),
        (b'{"prompt": "", "completion": ""}', "the text is empty"),
        (b'{"text": "\\ud800"}', "data"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(line: bytes, message: str, source: Source, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"data\.jsonl:2: .*{message}" if message != "data" else r"data\.jsonl:2: "):
        load(path, source)


def test_a_chat_template_that_refuses_is_reported_with_its_reason(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"messages": CONVERSATION}])
    with pytest.raises(
        InputError, match=r"data\.jsonl:1: the chat template refuses the messages: roles must alternate"
    ):
        load(path, open_source(str(tmp_path)))


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"messages": CONVERSATION}])
    with pytest.raises(InputError, match=r"data\.jsonl:1: the base's tokenizer has no chat template"):
        load(path, open_source(str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_samples_is_refused(content: bytes, source: Source, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"data\.jsonl holds no sample; expected one JSON object per line"):
        load(tmp_path / "data.jsonl", source)


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(source: Source, tmp_path: Path) -> None:
    for path, found in ((tmp_path / "absent.jsonl", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=f"{found}; expected JSONL"):
            load(path, source)


def test_a_base_without_tokenizer_is_refused_for_texts(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match="no usable tokenizer for text data"):
        load(path, open_source(str(tmp_path)))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_with_the_line(source: Source, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**pico.LLAMA, "vocab_size": 97})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    pico.save_tokenizer(tmp_path)
    assert ids("}~") == [96, 97]
    path = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "}"}, {"text": "}~}"}])
    message = r"data\.jsonl:2: token 97 is outside the model's vocabulary of 97"
    with pytest.raises(InputError, match=message):
        load(path, open_source(str(tmp_path)))
