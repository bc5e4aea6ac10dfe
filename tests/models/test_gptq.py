"""Checkpoints of GPTQ are read as numbers minus zero points times scales, packed as its tools pack them."""

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
from emloc_tools.models.quantised import gptq
from emloc_tools.models.quantised.gptq import GptqFolder
from emloc_tools.models.quantised.packed_words import unpack
from tests import pico
from tests.models.bit_sequences import pack_rows
from tests.models.quantised_stages import require_equal_stages, save_plain

Tensors = dict[str, torch.Tensor]
LESS = {"gptq": 1, "gptq_v2": 0, "auto_round:auto_gptq": 1, "auto_round:gptqmodel": 0}
CALLED = {
    name: {"quant_method": "auto-round", "packing_format": name}
    if "round" in name
    else {"quant_method": "gptq", "checkpoint_format": name}
    for name in LESS
}


def quantised(inputs: int, outputs: int, bits: int, group: int, *, ordered: bool, less: int) -> tuple[Tensors, Any]:
    """The parts of a random layer, packed along inputs and, for zero points, along outputs; and its weight in float64.

    One zero point is 0: less one, it is stored as the largest number.
    """
    groups = torch.arange(inputs) // group
    if ordered:
        groups = groups[torch.randperm(inputs)]
    count = int(groups.max()) + 1
    numbers, zeros = torch.randint(1 << bits, (inputs, outputs)), torch.randint(1 << bits, (count, outputs))
    zeros[0, 0] = 0
    scales = (torch.rand(count, outputs) + 0.1).half()
    parts = {
        "qweight": pack_rows(numbers.T, bits).T.contiguous(),
        "qzeros": pack_rows((zeros - less) % (1 << bits), bits),
        "scales": scales,
    }
    if ordered:
        parts["g_idx"] = groups.int()
    return parts, ((numbers - zeros[groups]) * scales.double()[groups]).T


def folder(path: Path, parts: Tensors, dtype: torch.dtype = torch.float32, **quantisation: Any) -> GptqFolder:
    save_file({f"a.{part}": tensor for part, tensor in parts.items()}, path / "model.safetensors")
    return GptqFolder(TensorFolder.of_files([path / "model.safetensors"]), quantisation, dtype)


def test_three_bits_straddle_words_as_the_format_describes() -> None:
    """In words of ten whole numbers each: number 10 has two bits in the first, number 21 one in the second."""
    v = torch.randint(8, (32,)).tolist()
    first = sum(v[j] << (3 * j) for j in range(10)) | (v[10] & 3) << 30
    second = v[10] >> 2 | sum(v[11 + j] << (3 * j + 1) for j in range(10)) | (v[21] & 1) << 31
    third = v[21] >> 1 | sum(v[22 + j] << (3 * j + 2) for j in range(10))
    words = torch.tensor([[first], [second], [third]]).to(torch.int32)  # those with the highest bit are negative
    assert unpack(words, 3, dim=0).flatten().tolist() == v
    assert unpack(words.T, 3, dim=1).flatten().tolist() == v


@pytest.mark.parametrize("ordered", [False, True], ids=["in-turn", "by-activation"])
@pytest.mark.parametrize("version", list(LESS))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_numbers_minus_zero_points_times_scales(
    bits: int, version: str, ordered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the groups of 48 inputs has 32."""
    parts, expected = quantised(128, 64, bits, 48, ordered=ordered, less=LESS[version])
    for at_once in (gptq.AT_ONCE, 64 * 32):  # all inputs together, and 32 at a time
        monkeypatch.setattr(gptq, "AT_ONCE", at_once)
        with folder(tmp_path, parts, group_size=48, **CALLED[version]) as opened:
            assert opened.names() == ["a.weight"]
            assert opened.spec("a.weight").shape == (64, 128)
            found = opened.read("a.weight")
            assert opened.bytes_read == sum(tensor.nbytes for tensor in parts.values())
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    other = "gptq" if LESS[version] == 0 else "gptq_v2"
    with folder(tmp_path, parts, group_size=48, **CALLED[other]) as opened:
        assert not torch.allclose(
            opened.read("a.weight").double(), expected
        )  # control: the other version's zero points


def test_without_a_group_size_all_inputs_share_a_scale_and_layers_may_differ_in_bits(tmp_path: Path) -> None:
    for bits in (4, 8):
        parts, expected = quantised(64, 32, bits, 64, ordered=False, less=1)
        with folder(tmp_path, parts, group_size=-1, bits=4) as opened:
            torch.testing.assert_close(opened.read("a.weight").double(), expected, rtol=1e-6, atol=0)


def save(root: Path) -> tuple[str, Tensors]:
    """A Llama whose layers are of 4 bits in groups of 16 by activation, as tools of the first version save it."""
    sizes = {**pico.LLAMA, "hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().save_pretrained(root)
    tensors, plain = load_file(root / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        outputs, inputs = tensors.pop(name).shape
        parts, W = quantised(inputs, outputs, 4, 16, ordered=True, less=1)
        parts["scales"] = parts["scales"] / 128
        plain[name] = (W / 128).bfloat16()
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    edit(root, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False})
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


def test_parts_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    parts, _ = quantised(128, 64, 4, 32, ordered=True, less=1)
    damages: dict[str, tuple[Tensors, str]] = {
        "words": ({"qweight": parts["qweight"][:-4]}, "a has parts that are not those of a layer in GPTQ"),
        "scales": ({"scales": parts["scales"][:, 1:]}, "a has parts that are not those of a layer in GPTQ"),
        "bits": ({"qzeros": parts["qzeros"].repeat(1, 3)}, "a has parts that are not those of a layer in GPTQ"),
        "dtype": ({"qweight": parts["qweight"].float()}, "a has parts that are not those of a layer in GPTQ"),
        "groups": ({"g_idx": parts["g_idx"] + 1}, "a has inputs of group 4, and scales for 4 groups"),
        "negative": ({"g_idx": parts["g_idx"] - 1}, "a has inputs of group 2, and scales for 4 groups"),
    }
    for change, message in damages.values():
        changed = {part: tensor.contiguous() for part, tensor in {**parts, **change}.items()}
        with folder(tmp_path, changed) as opened, pytest.raises(MismatchError, match=message):
            opened.read("a.weight")
    del parts["qzeros"]
    with folder(tmp_path, parts) as opened, pytest.raises(MismatchError, match="a has parts"):
        opened.read("a.weight")
    with pytest.raises(UnsupportedError, match=r"a\.scales belongs to no packed weight"):
        folder(tmp_path, {"scales": parts["scales"]})


@pytest.mark.parametrize("size", [16, 64, -1])
def test_another_size_of_groups_than_that_of_the_layer_is_refused(size: int, tmp_path: Path) -> None:
    """Without g_idx nothing but config.json says which inputs share a scale."""
    parts, W = quantised(128, 64, 4, 32, ordered=False, less=1)
    with folder(tmp_path, parts, group_size=32) as opened:
        assert torch.equal(opened.read("a.weight").double(), W.float().double())
    with (
        folder(tmp_path, parts, group_size=size) as opened,
        pytest.raises(
            MismatchError, match=r"a has scales for 4 groups of its 128 inputs, and config\.json says groups of"
        ),
    ):
        opened.read("a.weight")


def test_layers_that_gptq_stores_transposed_are_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path, "gpt2")
    edit(tmp_path, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError, match="is quantised by gptq, which stores Conv1D layers transposed"):
        open_base(str(tmp_path))
