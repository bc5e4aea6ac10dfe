"""The small files of a base go along with its emulator; weights, code and what describes the weights do not."""

from __future__ import annotations

from pathlib import Path

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
    for name in copied:
        assert (output / name).read_bytes() == (base / name).read_bytes()
