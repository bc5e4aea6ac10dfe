"""Checkpoints of AWQ in the version called gemm are read as numbers minus zero points times scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.base import open_base
from emloc_tools.models.quantised import awq
from emloc_tools.models.quantised.awq import AwqFolder
from tests import pico
from tests.models.bit_sequences import pack_rows
from tests.models.quantised_stages import require_equal_stages, save_plain

Tensors = dict[str, torch.Tensor]
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the outputs in a word, from its lowest four bits on


def quantised(inputs: int, outputs: int, group: int) -> tuple[Tensors, torch.Tensor]:
    """The parts of a random layer, packed along outputs, and its weight in float64."""
    groups = torch.arange(inputs) // group
    numbers, zeros = torch.randint(16, (inputs, outputs)), torch.randint(16, (int(groups.max()) + 1, outputs))
    scales = (torch.rand(zeros.shape) + 0.1).half()
    parts = {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scales}
    return parts, ((numbers - zeros[groups]) * scales.double()[groups]).T


def packed(numbers: torch.Tensor) -> torch.Tensor:
    """Words of eight numbers of a row each, in the order that AWQ gives them."""
    return pack_rows(torch.cat([eight[:, ORDER] for eight in numbers.split(8, dim=1)], dim=1), 4)


def folder(path: Path, parts: Tensors, **quantisation: Any) -> AwqFolder:
    save_file({f"a.{part}": tensor.contiguous() for part, tensor in parts.items()}, path / "model.safetensors")
    return AwqFolder(TensorFolder.of_files([path / "model.safetensors"]), quantisation, torch.float32)


def test_a_word_holds_even_outputs_before_odd_ones() -> None:
    """A literal word: from its lowest bits on, the outputs 0, 2, 4, 6, 1, 3, 5, 7 hold their own numbers."""
    assert awq._unpack(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist() == [list(range(8))]
    assert awq._unpack(torch.tensor([[0xF0000000 - (1 << 32)]]).int()).tolist() == [[0] * 7 + [15]]  # a negative word


@pytest.mark.parametrize("group", [16, 48, -1])  # the last of the groups of 48 inputs has 32; -1 is one group
def test_weights_are_numbers_minus_zero_points_times_scales(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, expected = quantised(128, 64, group if group > 0 else 128)
    for at_once in (awq.AT_ONCE, 64 * 10):  # all inputs together, and ten at a time
        monkeypatch.setattr(awq, "AT_ONCE", at_once)
        with folder(tmp_path, parts, group_size=group) as opened:
            assert opened.names() == ["a.weight"]
            assert opened.spec("a.weight").shape == (64, 128)
            found = opened.read("a.weight").double()
            assert opened.bytes_read == sum(tensor.nbytes for tensor in parts.values())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    in_order = torch.cat([eight[ORDER] for eight in found.split(8)])
    assert not torch.allclose(in_order, expected)  # control: outputs in the order of the bits


def save(root: Path) -> tuple[str, Tensors]:
    """A Llama as AWQ's tools save it, with a head in full precision; and its weights in bfloat16."""
    sizes = {**pico.LLAMA, "hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().save_pretrained(root)
    tensors, plain = load_file(root / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        outputs, inputs = tensors.pop(name).shape
        parts, W = quantised(inputs, outputs, 16)
        parts["scales"], plain[name] = parts["scales"] / 128, (W / 128).bfloat16()
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    edit(root, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True})
    pico.save_tokenizer(root)
    return str(root), plain | {n: t for n, t in tensors.items() if n.endswith(".weight")}


def edit(root: Path, quantisation: dict[str, Any]) -> None:
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


def test_every_stage_equals_that_of_the_same_numbers_in_full_precision(tmp_path: Path) -> None:
    base, tensors = save(tmp_path / "quantised")
    opened = open_base(base)
    weights = opened.weights()
    assert weights.ignored == []
    for name, tensor in weights.load(weights.stored_names()).items():
        assert torch.equal(tensor, tensors[name]), name
    opened.tensors.close()
    require_equal_stages(base, save_plain(tmp_path / "plain", tmp_path / "quantised", tensors), tmp_path)


def test_autoround_writes_the_same_layout(tmp_path: Path) -> None:
    parts, expected = quantised(64, 32, 16)
    quantisation = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 16}
    assert awq.is_awq(quantisation)
    assert not awq.is_awq({**quantisation, "packing_format": "auto_round:auto_gptq"})
    with folder(tmp_path, parts, **quantisation) as opened:
        torch.testing.assert_close(opened.read("a.weight").double(), expected, rtol=1e-6, atol=0)


def test_parts_that_do_not_fit_and_scaled_activations_are_refused_by_name(tmp_path: Path) -> None:
    parts, _ = quantised(128, 64, 16)
    for change in (
        {"qweight": parts["qweight"][:-16]},
        {"qweight": parts["qweight"].float()},
        {"scales": parts["scales"][:, :-8]},
        {"qzeros": parts["qzeros"][:-1]},
    ):
        opened = folder(tmp_path, {**parts, **change}, group_size=16)
        with pytest.raises(MismatchError, match="a has parts that are not those of a layer in AWQ"):
            opened.read("a.weight")
        opened.close()
    with folder(tmp_path, parts, group_size=32) as opened, pytest.raises(MismatchError, match="groups of 32 inputs"):
        opened.read("a.weight")
    with pytest.raises(UnsupportedError, match=r"act\.scales belongs to no packed weight, so the model computes"):
        folder(tmp_path, {**parts, "act.scales": torch.ones(64)})
