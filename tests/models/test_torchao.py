"""Checkpoints of torchao with unpacked numbers are read by their definition, and others are refused by their class.

torchao itself is not used: the checkpoints are those that its release 0.18 writes, name for name.
"""

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
from emloc_tools.models.quantised.torchao_weights import TorchaoFolder
from tests import pico
from tests.models.quantised_stages import require_equal_stages, save_plain

Tensors = dict[str, torch.Tensor]
ROWS, COLUMNS = 48, 64
KINDS: dict[str, tuple[str, list[int]]] = {
    "int8-rows": ("Int8Tensor", [1, COLUMNS]),
    "int8-groups": ("Int8Tensor", [1, 32]),
    "int4-groups": ("IntxUnpackedToInt8Tensor", [1, 16]),
    "float8-rows": ("Float8Tensor", [1, COLUMNS]),
    "float8-tensor": ("Float8Tensor", [ROWS, COLUMNS]),
    "float8-blocks": ("Float8Tensor", [16, 32]),
}


def quantised(
    kind: str, block: list[int], rows: int = ROWS, columns: int = COLUMNS
) -> tuple[Tensors, str, torch.Tensor]:
    """The parts of a random weight, what the metadata say of it, and its values in float64 by plain loops."""
    blocks = (rows // block[0], columns // block[1])
    scale, zeros = torch.rand(blocks) + 0.1, torch.randint(-8, 8, blocks, dtype=torch.int8)
    if kind == "Float8Tensor":
        qdata, parts = torch.randn(rows, columns).to(torch.float8_e4m3fn), {}
        zeros = torch.zeros(blocks)
    else:
        qdata, parts = torch.randint(-8, 8, (rows, columns), dtype=torch.int8), {"zero_point": zeros}
    W = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            at = (i // block[0], j // block[1])
            W[i, j] = (float(qdata[i, j]) - float(zeros[at])) * float(scale[at])
    dtype = {"_type": "torch.dtype", "_data": "bfloat16"}
    data = {"block_size": block, "dtype": dtype, "act_quant_kwargs": None}
    names = ["qdata", "scale", *parts]
    description = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": names})
    return {"qdata": qdata, "scale": scale, **parts}, description, W


def folder(path: Path, parts: Tensors, description: str) -> TorchaoFolder:
    tensors = {f"a._weight_{part}": tensor for part, tensor in parts.items()}
    metadata = {"a.weight": description, "tensor_names": '["a.weight"]'}
    save_file(tensors, path / "model.safetensors", metadata=metadata)
    return TorchaoFolder(TensorFolder.of_files([path / "model.safetensors"]), torch.float32)


@pytest.mark.parametrize("layout", list(KINDS))
def test_weights_are_numbers_minus_zero_points_times_the_scales_of_their_blocks(layout: str, tmp_path: Path) -> None:
    parts, description, expected = quantised(*KINDS[layout])
    with folder(tmp_path, parts, description) as opened:
        assert opened.names() == ["a.weight"]
        assert opened.spec("a.weight").shape == (ROWS, COLUMNS)
        found = opened.read("a.weight").double()
        assert opened.bytes_read == sum(tensor.nbytes for tensor in parts.values())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(found, expected.flip(0))  # control: other rows


def test_every_stage_equals_that_of_the_same_numbers_in_full_precision(tmp_path: Path) -> None:
    base = tmp_path / "quantised"
    pico.save_model(base, dtype=torch.bfloat16)
    tensors, plain, metadata = load_file(base / "model.safetensors"), {}, {"format": "pt"}
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors.pop(name).shape
        parts, metadata[name], W = quantised("Int8Tensor", [1, columns], rows, columns)
        parts["scale"], plain[name] = parts["scale"] / 64, (W / 64).bfloat16()
        tensors |= {name.replace(".weight", f"._weight_{part}"): tensor for part, tensor in parts.items()}
    save_file(tensors, base / "model.safetensors", metadata=metadata)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    plain |= {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    opened = open_base(str(base))
    assert opened.weights().ignored == []
    opened.tensors.close()
    require_equal_stages(str(base), save_plain(tmp_path / "plain", base, plain), tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "quantised-merged").dtype == torch.bfloat16


def test_packed_classes_scaled_activations_and_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    parts, description, _ = quantised("Int8Tensor", [1, 32])
    cases: list[tuple[Tensors, dict[str, Any], type[Exception], str]] = [
        ({}, {"_type": "Int4Tensor"}, UnsupportedError, "a.weight is a Int4Tensor of torchao, and only Float8Tensor"),
        ({"act_pre_scale": torch.ones(1)}, {}, UnsupportedError, "Int8Tensor of torchao with act_pre_scale"),
        ({}, {"_data": {"block_size": [1, 24]}}, MismatchError, r"blocks of \[1, 24\], into which \[48, 64\] cannot"),
        ({}, {"_data": {}}, MismatchError, "has blocks of None"),
        (
            {"scale": torch.ones(48, 1)},
            {},
            MismatchError,
            r"_weight_scale has shape \[48, 1\], where \[48, 2\] belongs",
        ),
        ({"qdata": parts["qdata"].float()}, {}, MismatchError, "is torch.float32, where torch.int8 belongs"),
    ]
    for tensors, changes, error, message in cases:
        opened = folder(tmp_path, {**parts, **tensors}, json.dumps({**json.loads(description), **changes}))
        with pytest.raises(error, match=message):
            opened.read("a.weight")
        opened.close()
    del parts["scale"]
    with folder(tmp_path, parts, description) as opened, pytest.raises(MismatchError, match=r"lacks a\._weight_scale"):
        opened.read("a.weight")
    with folder(tmp_path, parts, "{") as opened, pytest.raises(MismatchError, match="has no description of torchao"):
        opened.read("a.weight")
