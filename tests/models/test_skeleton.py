"""Models are built without their weights, and code in a model's folder runs only when it is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.base import open_base
from emloc_tools.models.processors import load_tokenizer
from emloc_tools.models.skeleton import build_skeleton, compute_dtype, load_config, model_class, parameters_on_meta
from emloc_tools.models.source import open_source
from tests import pico
from tests.conftest import Run
from tests.streaming.streamed import in_memory

CODE = """
from pathlib import Path
import transformers
Path({marker!r}).write_text("ran")
class OwnConfig(transformers.LlamaConfig):
    model_type = "own-llama"
class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object; None takes a key away."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def own_code(tmp_path: Path) -> tuple[Path, Path]:
    """A model whose class and configuration are code in its folder, and the file that the code writes when run."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    pico.save_model(folder)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own-llama", architectures=["OwnModel"], auto_map=auto_map)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def test_code_in_a_model_folder_never_runs_without_trust(own_code: tuple[Path, Path]) -> None:
    folder, marker = own_code
    with pytest.raises(InputError, match="code in the model's own folder; pass --trust-remote-code"):
        open_base(str(folder))
    assert not marker.exists()
    # Control: with trust it runs, and the model opens.
    opened = open_base(str(folder), trust_remote_code=True)
    assert marker.read_text() == "ran"
    assert (opened.architecture, type(opened.config).__name__) == ("OwnModel", "OwnConfig")


def test_a_foreign_class_of_a_known_type_needs_trust(own_code: tuple[Path, Path]) -> None:
    folder, marker = own_code
    edit_json(folder / "config.json", model_type="llama", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    with pytest.raises(UnsupportedError, match=r"OwnModel is code in the model's own folder; pass --trust-remote-code"):
        open_base(str(folder))
    assert not marker.exists()
    assert open_base(str(folder), trust_remote_code=True).architecture == "OwnModel"
    assert marker.exists()


def test_code_of_a_tokenizer_never_runs_without_trust(own_code: tuple[Path, Path]) -> None:
    folder, marker = own_code
    edit_json(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map=None)
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    edit_json(folder / "tokenizer_config.json", **tokenizer)
    source = open_source(str(folder))
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(source)
    assert not marker.exists()
    assert type(load_tokenizer(source, trust_remote_code=True)).__name__ == "OwnTokenizer"
    assert marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": ["NoSuchModel"]}, "has no model class NoSuchModel"),
        ({"architectures": ["pipeline"]}, "has no model class pipeline"),
        ({"architectures": ["LlamaConfig"]}, "has no model class LlamaConfig"),
        ({"model_type": "no-such-type"}, r"config\.json cannot be used"),
        ({"model_type": None}, r"config\.json cannot be used"),
        ({"hidden_size": "wide"}, r"config\.json cannot be used"),
        ({"num_attention_heads": 5}, r"config\.json cannot be used"),
    ],
)
def test_an_unusable_configuration_is_a_message(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises((InputError, UnsupportedError), match=message):
        open_base(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_broken_config_is_a_message(content: bytes, tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json cannot be used"):
        open_base(str(tmp_path))


@pytest.mark.parametrize("trust", [False, True])
def test_an_emulator_is_refused_as_a_base_and_its_code_not_run(trust: bool, run: Run) -> None:
    with pytest.raises(InputError, match="is an emulator made by emloc-tools"):
        open_base(str(run.emulator), trust_remote_code=trust)


@pytest.mark.parametrize("family", list(pico.CLASSES))
def test_the_skeleton_has_parameters_on_meta_and_the_buffers_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path, family)
    model, expected = open_base(str(tmp_path)).model, in_memory(tmp_path)
    assert not model.training
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_building_a_skeleton_does_not_change_how_modules_register_parameters(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    open_base(str(tmp_path))
    with pytest.raises(KeyError), parameters_on_meta():
        raise KeyError
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_parameter_that_is_registered_twice_stays_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(3, 3))
            weight.note = "kept"  # type: ignore[attr-defined]
            self.a, self.b, self.c = weight, weight, nn.Parameter(torch.ones(3, 3))

    with parameters_on_meta():
        tied = Tied()
    assert tied.a is tied.b
    assert tied.a is not tied.c
    assert tied.a.is_meta
    assert tied.a.note == "kept"  # type: ignore[attr-defined]


def test_the_dtype_is_the_requested_else_the_configured_else_float32(tmp_path: Path) -> None:
    pico.save_model(tmp_path, dtype=torch.bfloat16)
    source = open_source(str(tmp_path))
    assert compute_dtype(load_config(source)) == torch.bfloat16
    assert compute_dtype(load_config(source), "float16") == torch.float16
    for key in ("dtype", "torch_dtype"):  # the second is what older files have
        edit_json(tmp_path / "config.json", dtype=None, torch_dtype=None)
        edit_json(tmp_path / "config.json", **{key: "float16"})
        assert compute_dtype(load_config(source)) == torch.float16
    edit_json(tmp_path / "config.json", dtype=None, torch_dtype=None)
    assert compute_dtype(load_config(source)) == torch.float32
    opened = open_base(str(tmp_path), dtype="bfloat16")
    assert {p.dtype for p in opened.model.parameters()} == {torch.bfloat16}


def test_the_class_is_that_of_the_architecture_and_not_of_the_model_type(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "bert")
    source = open_source(str(tmp_path))
    config = load_config(source)
    assert model_class(config, source) is transformers.BertForMaskedLM
    edit_json(tmp_path / "config.json", architectures=["BertForTokenClassification"])
    config = load_config(source)
    cls = model_class(config, source)
    assert cls is transformers.BertForTokenClassification
    assert isinstance(build_skeleton(cls, config, dtype=torch.float32), cls)
