"""GPT-OSS in MXFP4 is read as transformers dequantises it, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.models.base import open_base
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from tests import pico
from tests.experts import families

# Sign, two bits of exponent, one of fraction.
TABLE = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def save_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """A pico GPT-OSS with random blocks and scales for its experts, and their values by plain arithmetic."""
    config = families.FAMILIES["gpt-oss"].config()
    config.intermediate_size, config.dtype = 64, torch.bfloat16  # of whole blocks
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 127, blocks.shape[:-1], dtype=torch.uint8)
        entries = TABLE[torch.stack([blocks.long() & 15, blocks.long() >> 4], dim=-1).flatten(-2)]
        values[name] = (entries * 2.0 ** (scales.double()[..., None] - 127)).flatten(-2).mT
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": {"quant_method": "mxfp4"}}))
    return values


def test_experts_are_table_entries_times_powers_of_two_as_transformers_has_them(tmp_path: Path) -> None:
    values = save_mxfp4(tmp_path)
    model = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    opened = open_base(str(tmp_path))
    weights = opened.weights()
    assert opened.dequantised
    assert weights.ignored == []
    loaded = weights.load(weights.stored_names())
    into = torch.empty(loaded[STACK].nbytes, dtype=torch.uint8)
    assert torch.equal(opened.tensors.read(STACK, into), loaded[STACK])
    opened.tensors.close()
    assert loaded.keys() == dict(model.named_parameters()).keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, model.get_parameter(name)), name
    for name, value in values.items():
        assert torch.equal(loaded[name].double(), value)  # bfloat16 holds every such product exactly
        assert not torch.equal(loaded[name].double(), value.flip(1))


def test_an_emulator_of_mxfp4_equals_that_of_the_same_numbers_in_bfloat16(tmp_path: Path) -> None:
    values = save_mxfp4(tmp_path / "mxfp4")
    tensors = load_file(tmp_path / "mxfp4" / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    tensors |= {name: value.bfloat16().contiguous() for name, value in values.items()}
    config = json.loads((tmp_path / "mxfp4" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    data = pico.save_texts(tmp_path / "data.jsonl", count=3)
    made = []
    for name in ("mxfp4", "plain"):
        base, calibration, emulator = (tmp_path / (name + end) for end in ("", "-calibration", "-emulator"))
        pico.save_tokenizer(base)
        calibrate(base=str(base), data=data, output=calibration, max_length=16, device="cpu")
        build_emulator(base=str(base), calibration=calibration, ratio=0.5, output=emulator)
        made.append(load_file(emulator / "model.safetensors"))
    pico.save_lora(tmp_path / "lora", tmp_path / "mxfp4-emulator", target_modules=["q_proj", "o_proj"])
    for name in ("mxfp4", "plain"):  # an emulator of one fits the other: the weights are the same
        correct(
            emulator=tmp_path / "mxfp4-emulator",
            adapter=tmp_path / "lora",
            base=str(tmp_path / name),
            output=tmp_path / f"{name}-corrected",
        )
        made.append(load_file(tmp_path / f"{name}-corrected" / "adapter_model.safetensors"))
    for one, other in (made[:2], made[2:]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    uncorrected = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any(not torch.equal(made[2][name], uncorrected[name]) for name in uncorrected)  # control


def test_blocks_and_scales_that_do_not_fit_and_blocks_alone_are_refused(tmp_path: Path) -> None:
    save_mxfp4(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scales = tensors.pop(f"{STACK}_scales")
    save_file({**tensors, f"{STACK}_scales": scales[:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError, match=rf"{STACK}_blocks is .* and {STACK}_scales .* belong"):
        open_base(str(tmp_path)).tensors.read(STACK)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=f"{STACK}_blocks has packed numbers that are not blocks beside scales"):
        open_base(str(tmp_path)).tensors.read(f"{STACK}_blocks")
