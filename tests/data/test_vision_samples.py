"""Records with images become batches: what counts, what is a target, what the model gets, and every fault's line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from emloc_tools.data.batches import Batch, count_samples, count_tokens, load_batches
from emloc_tools.errors import InputError
from emloc_tools.models.processors import load_processor
from emloc_tools.models.skeleton import load_config
from emloc_tools.models.source import Source, open_source
from tests import pico, pico_vision
from tests.pico_vision import answer, question

SIZES = {"small.png": (28, 28), "tall.png": (28, 42)}
# Tokens of the two pictures: one for 49 pixels of a square (LLaVA), four for a tile of 28 x 28 and two marks, with the
# whole picture as a third tile beside the two of the tall one (InternVL), one for 14 x 14 pixels and two marks (Qwen).
TOKENS = {
    "llava": {"small.png": 16, "tall.png": 16},
    "internvl": {"small.png": 4 + 2, "tall.png": 3 * 4 + 2},
    "qwen2.5-vl": {"small.png": 4 + 2, "tall.png": 6 + 2},
}
NOT_TARGETS = {"llava": TOKENS["llava"], "internvl": TOKENS["internvl"], "qwen2.5-vl": {"small.png": 4, "tall.png": 6}}
ASKED = len("<s>") // 3 + len("user: ") + len("Which colour?") + 1  # `<s>` and `</s>` are one token each


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """A base of every family without weights."""
    found = {}
    for family in pico_vision.FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        config = pico_vision.config(family)
        config.architectures = [pico_vision.CLASSES[family]]
        config.save_pretrained(folder)
        pico_vision.save_processor(folder, family)
        found[family] = open_source(str(folder))
    return found


@pytest.fixture(params=pico_vision.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family."""
    return str(request.param)


@pytest.fixture
def source(family: str, sources: dict[str, Source]) -> Source:
    """The base of the family."""
    return sources[family]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures."""
    for name, size in SIZES.items():
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / name)
    return tmp_path


def load(folder: Path, source: Source, records: list[Any], **options: Any) -> list[Batch]:
    """`load_batches` of records beside the pictures."""
    path = pico.write_jsonl(folder / "data.jsonl", records)
    return load_batches(path, source, **{"samples": None, "max_length": None, "batch_size": 1, "seed": 0, **options})


def chat(picture: str, said: str = "red") -> dict[str, Any]:
    """A record of a question about a picture and its answer."""
    return {"messages": [question(picture), answer(said)]}


def answered(said: str) -> int:
    """Tokens of an answer with its role: one for each character and for each mark."""
    return 1 + len("assistant: ") + len(said) + 1


def test_image_tokens_and_text_tokens_count_and_padding_does_not(family: str, source: Source, folder: Path) -> None:
    records = [chat("small.png"), chat("tall.png", "a blue one"), chat("small.png", "")]
    lengths = [
        ASKED + TOKENS[family][picture] + answered(said)
        for picture, said in (("small.png", "red"), ("tall.png", "a blue one"), ("small.png", ""))
    ]
    batches = load(folder, source, records, batch_size=2)
    assert [batch.inputs["input_ids"].shape for batch in batches] == [(2, max(lengths[:2])), (1, lengths[2])]
    assert (count_samples(batches), count_tokens(batches)) == (3, sum(lengths))
    first, last = batches
    assert first.mask is not None
    assert first.mask.tolist() == [[place < length for place in range(max(lengths[:2]))] for length in lengths[:2]]
    assert last.mask is None
    assert torch.equal(first.inputs["attention_mask"].bool(), first.mask)


def test_every_token_of_a_chat_is_a_target_but_those_of_images(family: str, source: Source, folder: Path) -> None:
    (batch,) = load(folder, source, [chat("tall.png")])
    assert batch.targets is not None
    assert int(batch.targets.sum()) == batch.targets.numel() - NOT_TARGETS[family]["tall.png"]
    assert int(batch.inputs["input_ids"][~batch.targets].min()) >= pico.VOCABULARY  # special ids follow those of text


@pytest.mark.parametrize("picture", list(SIZES))
def test_only_the_completion_of_a_prompt_with_images_is_a_target(
    picture: str, family: str, source: Source, folder: Path
) -> None:
    records = [
        {"prompt": [question(picture)], "completion": [answer("blue")]},
        {
            "prompt": [{"role": "user", "content": "Which colour?"}],
            "completion": [{"role": "assistant", "content": "blue"}],
            "images": [picture],
        },
    ]
    batches = load(folder, source, records)
    for batch in batches:
        ids, targets = batch.inputs["input_ids"], batch.targets
        assert targets is not None
        length = ASKED + TOKENS[family][picture] + answered("blue")
        assert targets.tolist() == [[False] * (length - 5) + [True] * 5]  # b, l, u, e and the end
        assert ids[targets][-1] == 2  # </s>
        assert torch.equal(ids, batches[0].inputs["input_ids"])


def test_the_model_gets_what_its_processor_makes_of_the_conversations(source: Source, folder: Path) -> None:
    """Against transformers' own way from conversations to model inputs."""
    two = {"messages": [question("small.png"), answer("red"), question("tall.png"), answer("blue")]}
    plain = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, answer("Hi")]}
    records = [plain, two, chat("small.png")]
    (batch,) = load(folder, source, records, batch_size=3)
    conversations = []
    for record in records:
        messages = []
        for message in record["messages"]:
            parts = [
                {"type": "image", "image": Image.open(folder / part["image"])} if part["type"] == "image" else part
                for part in message["content"]
            ]
            messages.append({"role": message["role"], "content": parts})
        conversations.append(messages)
    processor = load_processor(source, load_config(source))
    expected = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
    )
    assert set(batch.inputs) == set(expected)
    assert len(batch.inputs) == len(expected)
    for name, tensor in batch.inputs.items():
        assert torch.equal(tensor, expected[name]), name
        assert torch.equal(batch.inputs[name], expected[name]), name


def test_a_batch_without_images_in_a_file_with_images_has_no_pixels(source: Source, folder: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "Hello"}, answer("Hi")]}
    first, second = load(folder, source, [plain, chat("small.png")])
    assert "pixel_values" not in first.inputs
    assert "pixel_values" in second.inputs


def test_pixels_are_read_when_they_are_used_and_not_kept(source: Source, folder: Path) -> None:
    (batch,) = load(folder, source, [chat("small.png")])
    before = batch.inputs["pixel_values"]
    with Image.open(folder / "small.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(folder / "small.png")
    assert not torch.equal(batch.inputs["pixel_values"], before)
    (folder / "small.png").unlink()
    assert batch.inputs["input_ids"].numel() > 0  # ids need no file
    with pytest.raises(InputError, match=r"the image .*small\.png does not exist"):
        dict(batch.inputs.items())
    with pytest.raises(KeyError):
        batch.inputs["labels"]


def test_plain_strings_are_not_lost_on_a_template_that_looks_for_parts(source: Source, folder: Path) -> None:
    """Neither beside images nor in a file of texts alone, which needs no Pillow."""
    plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    template = load_processor(source, load_config(source)).tokenizer
    lost = template.apply_chat_template(plain, tokenize=False, chat_template=pico_vision.CHAT_TEMPLATE)
    assert "Hello" not in lost, "the control: what the template makes of strings"
    length = 1 + len("user: Hello") + 1 + answered("Hi")
    with_image, without = load(folder, source, [chat("small.png"), {"messages": plain}])
    (alone,) = load(folder, source, [{"messages": plain}])
    assert alone.inputs["input_ids"].tolist() == without.inputs["input_ids"].tolist()
    assert alone.inputs["input_ids"].shape == (1, length)
    assert with_image.inputs["input_ids"].shape[1] > length


def test_a_file_of_texts_alone_needs_no_pillow(source: Source, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    (batch,) = load(folder, source, [{"messages": [{"role": "user", "content": "Hello"}]}])
    assert set(batch.inputs) == {"input_ids"}


def test_a_plain_text_with_the_familys_mark_takes_listed_images(family: str, source: Source, folder: Path) -> None:
    mark = pico_vision.MARKS[family]
    records = [
        {"text": f"see {mark}!", "images": ["tall.png"]},
        {"prompt": f"see {mark}", "completion": "!", "images": ["tall.png"]},
    ]
    first, second = load(folder, source, records)
    assert first.inputs["input_ids"].shape == (1, len("see !") + TOKENS[family]["tall.png"])
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
    assert second.targets is not None
    assert second.targets.nonzero().tolist() == [[0, second.targets.shape[1] - 1]]


def test_texts_are_cut_after_their_last_image_and_images_never(family: str, source: Source, folder: Path) -> None:
    """The tokens of both images end before the answer, of which five tokens are cut off."""
    records = [chat("small.png", "blue"), chat("tall.png", "light blue")]
    whole = load(folder, source, records, batch_size=2)[0].inputs
    shorter, longer = (
        ASKED + TOKENS[family][picture] + answered(said)
        for picture, said in (("small.png", "blue"), ("tall.png", "light blue"))
    )
    limit = longer - 5
    (batch,) = load(folder, source, records, batch_size=2, max_length=limit)
    assert batch.inputs["input_ids"].shape == (2, limit)
    assert count_tokens([batch]) == min(shorter, limit) + limit
    for name, tensor in batch.inputs.items():
        tokens = whole[name].shape[:2] == (2, longer)
        assert torch.equal(tensor, whole[name][:, :limit] if tokens else whole[name]), name
    within = 1 + len("user: ") + TOKENS[family]["tall.png"] - 2
    message = rf"data\.jsonl:2: {longer} tokens, and the last of 1 images ends at token \d+; images are not cut"
    with pytest.raises(InputError, match=message):
        load(folder, source, [{"text": "x"}, records[1]], max_length=within)


def test_the_positions_of_the_model_limit_image_tokens_too(source: Source, folder: Path) -> None:
    positions = load_config(source).get_text_config().max_position_embeddings
    pictures = {"type": "image", "image": "tall.png"}
    text = [{"type": "text", "text": "x" * (positions - 20)}, *[pictures] * 3]
    with pytest.raises(InputError, match=rf"data\.jsonl:1: .* images ends at .* allow {positions}: raise"):
        load(folder, source, [{"messages": [{"role": "user", "content": text}]}])
    (batch,) = load(folder, source, [{"messages": [{"role": "user", "content": text[::-1]}]}])
    assert batch.inputs["input_ids"].shape == (1, positions)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat("absent.png"), r"the image .*absent\.png does not exist; paths are relative to the data file"),
        (chat("broken.png"), r"the image .*broken\.png cannot be read: "),
        (chat("https://example.org/a.png"), r"the image https://example\.org/a\.png is not a file; fetch it before"),
        ({"messages": [question("small.png"), {"content": "x"}]}, "every message must be an object with a `role`"),
        ({"text": "no mark", "images": ["small.png"]}, "(number of .* tokens in|its text has no place for one)"),
        ({"messages": [question("small.png", text="MARK?"), answer("x")]}, "(number of .* tokens in|places for more)"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]}, "a part of type 'video'"),
        ({"text": "", "images": []}, "the text is empty"),
    ],
)
def test_a_bad_record_is_refused_with_file_and_line(
    record: dict[str, Any], message: str, family: str, source: Source, folder: Path
) -> None:
    (folder / "broken.png").write_bytes((folder / "tall.png").read_bytes()[:200])
    bad = json.loads(json.dumps(record).replace("MARK", pico_vision.MARKS[family]))
    with pytest.raises(InputError, match=rf"data\.jsonl:2: .*{message}"):
        load(folder, source, [chat("small.png"), bad])


def test_an_image_for_a_model_that_reads_text_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "llama")
    llama = open_source(str(tmp_path / "llama"))
    message = r"data\.jsonl:2: names an image or other media, but LlamaForCausalLM reads text alone"
    with pytest.raises(InputError, match=message):
        load(folder, llama, [{"text": "a"}, chat("small.png")])


def test_other_media_are_refused_in_a_file_without_images_too(source: Source, folder: Path) -> None:
    sound = {"role": "user", "content": [{"type": "audio", "path": "a.wav"}, {"type": "text", "text": "What?"}]}
    with pytest.raises(InputError, match=r"data\.jsonl:2: a part of type 'audio' found, expected"):
        load(folder, source, [{"text": "a"}, {"messages": [sound]}])


def test_what_cannot_share_a_batch_says_so(family: str, source: Source, folder: Path) -> None:
    mixed = [chat("small.png"), {"text": f"see {pico_vision.MARKS[family]}", "images": ["small.png"]}]
    with pytest.raises(InputError, match=r"cannot share a batch with images; use --batch-size 1"):
        load(folder, source, mixed, batch_size=2)
    assert len(load(folder, source, mixed)) == 2
