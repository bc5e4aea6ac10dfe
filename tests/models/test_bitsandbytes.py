"""Checkpoints of bitsandbytes are read as the library dequantises them, and damaged ones are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file

from emloc_tools import load_emulator
from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.base import open_base
from emloc_tools.models.quantised.bitsandbytes_weights import BitsandbytesFolder
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.merge import merge
from tests import pico

KINDS: dict[str, dict[str, Any]] = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-in-bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama in bfloat16 (`plain`), and as transformers saves it after quantising it in each way.

    Its rows of 32 and 48 numbers are no multiples of a block, which has 64. In `even` the same are 64 and 128.
    """
    root = tmp_path_factory.mktemp("bitsandbytes")
    pico.save_model(root / "plain", dtype=torch.bfloat16)
    sizes = {**pico.LLAMA, "hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().save_pretrained(root / "even" / "plain")
    for folder in (root, root / "even"):
        for kind, options in KINDS.items():
            model = transformers.LlamaForCausalLM.from_pretrained(
                folder / "plain", quantization_config=transformers.BitsAndBytesConfig(**options), device_map="cpu"
            )
            model.save_pretrained(folder / kind)
            pico.save_tokenizer(folder / kind)
    return root


def reference(tensors: Tensors, name: str) -> torch.Tensor:
    """A quantised weight in float64, by the definition: a table's entry times the scale of its block, or of its row."""
    numbers = tensors[name]
    if numbers.dtype == torch.int8:
        return numbers.double() * tensors[name.replace("weight", "SCB")].double()[:, None] / 127
    (key,) = (n for n in tensors if n.startswith(f"{name}.quant_state"))
    state, scales = json.loads(bytes(tensors[key].tolist())), tensors[f"{name}.absmax"]
    if "nested_blocksize" in state:
        own = tensors[f"{name}.nested_absmax"].double().repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = tensors[f"{name}.nested_quant_map"].double()[scales.long()] * own + state["nested_offset"]
    packed = numbers.flatten().view(torch.uint8).long()
    entries = tensors[f"{name}.quant_map"].double()[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    return (entries * scales.double().repeat_interleave(state["blocksize"])[: len(entries)]).view(state["shape"])


def damaged(checkpoints: Path, target: Path, change: Callable[[Tensors], None], kind: str = "nf4-double") -> str:
    """A copy of a checkpoint with changed tensors."""
    tensors = load_file(checkpoints / kind / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((checkpoints / kind / "config.json").read_text())
    return str(target)


def with_state(**values: Any) -> Callable[[Tensors], None]:
    """Change entries of the JSON of one weight's state."""

    def change(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | values
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_weight_is_what_transformers_dequantises(kind: str, checkpoints: Path) -> None:
    checkpoints = checkpoints / "even"
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoints / kind, device_map="cpu").dequantize()
    plain = load_file(checkpoints / "plain" / "model.safetensors")
    stored = load_file(checkpoints / kind / "model.safetensors")
    opened = open_base(str(checkpoints / kind))
    weights = opened.weights()
    assert opened.dequantised
    assert weights.ignored == []
    assert set(weights.stored_names()) == dict(model.named_parameters()).keys()
    for name in weights.stored_names():
        assert weights.stored_spec(name) == (torch.bfloat16, tuple(plain[name].shape))
        before = opened.tensors.bytes_read
        (tensor,) = weights.load([name]).values()
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, model.get_parameter(name)), name
        assert torch.equal(tensor, plain[name]) != ("_proj" in name)  # control: quantising changed the layers alone
        own = [n for n in stored if n == name or n.startswith(f"{name}.") or n.startswith(f"{name}_format")]
        own += [n for n in stored if n == name.removesuffix("weight") + "SCB"]
        assert opened.tensors.bytes_read - before == sum(stored[n].nbytes for n in own)  # each tensor alone
        into = torch.empty(tensor.nbytes, dtype=torch.uint8)
        assert torch.equal(opened.tensors.read(name, into), tensor)
        assert torch.equal(into.view(torch.bfloat16).view(tensor.shape), tensor)
    opened.tensors.close()


@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_are_right_by_the_definition_where_blocks_do_not_divide_rows(kind: str, checkpoints: Path) -> None:
    stored = load_file(checkpoints / kind / "model.safetensors")
    opened = open_base(str(checkpoints / kind))
    for name in (name for name in opened.tensors.names() if "_proj" in name):
        found, expected = opened.tensors.read(name).double(), reference(stored, name)
        torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)  # half a unit of bfloat16's last place
        assert not torch.allclose(found, expected.flip(0), rtol=0.1)  # control: other blocks
    opened.tensors.close()


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (3, 50), (1, 2)])
def test_the_last_block_of_four_bits_may_be_incomplete(rows: int, columns: int, tmp_path: Path) -> None:
    W = torch.randn(rows, columns)
    packed, state = quantize_4bit(W, blocksize=64, quant_type="nf4")
    tensors = {"a.weight": packed} | {f"a.weight.{part}": t for part, t in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with BitsandbytesFolder(TensorFolder.of_files([tmp_path / "model.safetensors"]), torch.float32) as folder:
        assert folder.names() == ["a.weight"]
        found = folder.read("a.weight")
    entries = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: W.numel()].long()
    expected = state.code.double()[entries] * state.absmax.double().repeat_interleave(64)[: W.numel()]
    torch.testing.assert_close(found.double(), expected.view(rows, columns), rtol=1e-6, atol=1e-7)
    assert not torch.equal(found, W)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_every_stage_equals_that_of_the_dequantised_model(kind: str, checkpoints: Path, tmp_path: Path) -> None:
    checkpoints = checkpoints / "even"
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoints / kind, device_map="cpu").dequantize()
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    changed = "model.layers.0.self_attn.q_proj.weight"
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text((checkpoints / "plain" / "config.json").read_text())
    pico.save_tokenizer(tmp_path / "plain")
    data = pico.save_texts(tmp_path / "data.jsonl", count=3)
    bases = {"quantised": str(checkpoints / kind), "plain": str(tmp_path / "plain")}
    for name, base in bases.items():
        calibration, emulator = tmp_path / f"{name}-calibration", tmp_path / f"{name}-emulator"
        calibrate(base=base, data=data, output=calibration, max_length=16, device="cpu")
        build_emulator(base=base, calibration=calibration, ratio=0.5, output=emulator)
    assert load_emulator(tmp_path / "quantised-emulator").dtype == torch.bfloat16
    pico.save_lora(tmp_path / "lora", tmp_path / "quantised-emulator", target_modules=["q_proj", "o_proj"])
    for name, base in bases.items():
        options: dict[str, Any] = {"emulator": tmp_path / "quantised-emulator", "adapter": tmp_path / "lora"}
        correct(**options, base=base, output=tmp_path / f"{name}-corrected")
        merge(base=base, adapter=tmp_path / f"{name}-corrected", output=tmp_path / f"{name}-merged")
    files = {"emulator": "model", "corrected": "adapter_model", "merged": "model"}
    for made, file in files.items():
        one, other = (load_file(tmp_path / f"{name}-{made}" / f"{file}.safetensors") for name in bases)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), made
    for made in ("emulator", "merged"):
        assert "quantization_config" not in json.loads((tmp_path / f"quantised-{made}" / "config.json").read_text())
    assert not torch.equal(one[changed], tensors[changed])  # control: the LoRA is not zero


DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "short": (lambda t: t.update({UP: t[UP][:-1].clone()}), rf"{UP} has 767 bytes where 768 belong"),
    "scales": (
        lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][:5].clone()}),
        rf"{UP}\.absmax has 5 numbers where 24 belong",
    ),
    "kind": (
        lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"].float()}),
        rf"{UP}\.absmax is torch\.float32, which does not go with",
    ),
    "table": (lambda t: t.pop(f"{UP}.quant_map"), rf"{UP} lacks {UP}\.quant_map"),
    "nested": (lambda t: t.pop(f"{UP}.nested_absmax"), "is no state that bitsandbytes reads"),
    "block": (with_state(blocksize=48), "is no state that bitsandbytes reads"),
    "type": (with_state(quant_type="fp4"), "is no state that bitsandbytes reads"),
    "offset": (with_state(nested_offset="far"), "is no state of bitsandbytes .TypeError"),
    "json": (lambda t: t.update({STATE: t[STATE][:-4].clone()}), "is no state of bitsandbytes .JSONDecodeError"),
    "shape": (with_state(shape=[48, 33]), "has 24 numbers where 25 belong"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_state_that_does_not_fit_is_refused_before_the_library_sees_it(
    damage: str, checkpoints: Path, tmp_path: Path
) -> None:
    change, message = DAMAGES[damage]
    opened = open_base(damaged(checkpoints, tmp_path, change))
    assert opened.tensors.read(UP.replace("up", "gate")).shape == (48, 32)  # control: the others are whole
    with pytest.raises(MismatchError, match=message):
        opened.tensors.read(UP)
    opened.tensors.close()


@pytest.mark.parametrize(("kind", "part"), [("nf4-double", STATE), ("int8", UP.replace("weight", "SCB"))])
def test_packed_numbers_without_their_state_are_refused_by_name(
    kind: str, part: str, checkpoints: Path, tmp_path: Path
) -> None:
    opened = open_base(damaged(checkpoints, tmp_path, lambda tensors: tensors.pop(part), kind))
    with pytest.raises(UnsupportedError, match=f"the tensor {UP} has packed numbers, and neither"):
        opened.tensors.read(UP)
    opened.tensors.close()


def test_eight_bits_laid_out_for_a_gpu_and_scales_that_do_not_fit_are_refused(
    checkpoints: Path, tmp_path: Path
) -> None:
    layout, scales = f"{UP}_format", UP.replace("weight", "SCB")
    cases: dict[str, tuple[Callable[[Tensors], Any], type[Exception], str]] = {
        "tiles": (lambda t: t[layout].fill_(2), UnsupportedError, f"{UP} is laid out for one kind of GPU"),
        "rows": (lambda t: t.update({scales: t[scales][1:].clone()}), MismatchError, "has 47 numbers where 48 belong"),
    }
    for name, (change, error, message) in cases.items():
        (tmp_path / name).mkdir()
        opened = open_base(damaged(checkpoints, tmp_path / name, change, "int8"))
        with pytest.raises(error, match=message):
            opened.tensors.read(UP)
        opened.tensors.close()


def test_without_the_library_the_extra_is_named_and_an_old_configuration_is_known(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = damaged(checkpoints, tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    open_base(base).tensors.close()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UnsupportedError, match=r'that bitsandbytes reads, which is an extra: .*"emloc-tools\[bitsandbytes\]"'
    ):
        open_base(base)


def test_conv1d_layers_are_refused_since_bitsandbytes_stores_them_transposed(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "gpt2")
    open_base(str(tmp_path)).tensors.close()
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="stores Conv1D layers transposed"):
        open_base(str(tmp_path))
