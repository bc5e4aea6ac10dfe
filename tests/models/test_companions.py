"""The small files of a base go along with its emulator; weights, code and what describes the weights do not."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from emloc_tools.models.companions import copy_companions
from emloc_tools.models.source import open_source
from tests import pico

TAKEN = {"generation_config.json", "LICENSE.txt", "merges.txt", "NOTICE", "preprocessor_config.json", "spiece.model"}
LEFT = {
    "README.md",
    "adapter_config.json",
    "emloc.json",
    "emulator.json",
    "modeling_own.py",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "trainer_state.json",
    "training_args.json",
}


def test_tokenizer_processor_and_licence_are_copied_and_nothing_else(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "output"
    pico.save_model(base, max_shard_size="30KB")
    for name in TAKEN | LEFT:
        (base / name).write_text(f"this is {name}")
    (base / "onnx").mkdir()
    (base / "onnx" / "config.json").write_text("{}")
    output.mkdir()
    copied = copy_companions(open_source(str(base)), output)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(copied) == {path.name for path in output.iterdir()} == TAKEN | tokenizer
    assert copied == sorted(copied)
    for name in set(copied) - {"tokenizer_config.json"}:
        assert (output / name).read_bytes() == (base / name).read_bytes()


def test_a_tokenizer_saved_by_transformers_5_gets_the_name_that_4_knows_and_stays_the_same(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "output"
    pico.save_model(base)
    saved = json.loads((base / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend"
    output.mkdir()
    copy_companions(open_source(str(base)), output)
    copied = json.loads((output / "tokenizer_config.json").read_text())
    assert copied == {**saved, "tokenizer_class": "PreTrainedTokenizerFast"}
    text = "for x in range(3):  # ünïcode"
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (base, output)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_a_tokenizer_configuration_that_is_no_json_is_copied_as_it_is(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "output"
    pico.save_model(base)
    (base / "tokenizer_config.json").write_text("{")
    output.mkdir()
    copy_companions(open_source(str(base)), output)
    assert (output / "tokenizer_config.json").read_text() == "{"
