"""FP8 checkpoints are read as their numbers times their scales, and what cannot be read is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emloc_tools import load_emulator
from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.base import open_base
from emloc_tools.models.quantised.fp8 import Fp8Folder, dequantise, is_fp8
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.merge import merge
from tests import pico

F8 = torch.float8_e4m3fn
BLOCK = (16, 8)
TENSORWISE: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
    "tensor": TENSORWISE,
    "row": {"quant_method": "fbgemm_fp8"},
}


def quantise(W: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 numbers of W, their scales, and the products by plain loops in float64."""
    rows, columns = W.shape
    height, width = {"block": BLOCK, "tensor": (rows, columns), "row": (1, columns)}[layout]
    grid = torch.zeros(math.ceil(rows / height), math.ceil(columns / width))
    numbers, products = torch.empty(rows, columns, dtype=F8), torch.empty(rows, columns, dtype=torch.float64)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            grid[i, j] = W[part].abs().max() / 448
            numbers[part] = (W[part] / grid[i, j]).to(F8)
            products[part] = numbers[part].double() * grid[i, j].double()
    return numbers, grid.reshape(1) if layout == "tensor" else grid, products


def save_fp8(folder: Path, layout: str, family: str = "llama") -> dict[str, torch.Tensor]:
    """A pico model whose linear layers are FP8, and the products of these by checkpoint name."""
    pico.save_model(folder, family, dtype=torch.bfloat16)
    tensors, products = load_file(folder / "model.safetensors"), {}
    suffix = "_scale_inv" if layout == "block" else "_scale"
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and "_proj" in name:
            tensors[name], tensors[name + suffix], products[name] = quantise(tensor.float(), layout)
    if layout == "tensor":  # what is there for runtimes that compute in FP8
        tensors["model.layers.0.self_attn.q_proj.input_scale"] = torch.ones(1)
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config=LAYOUTS[layout])
    return products


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def in_memory(folder: Path, products: dict[str, torch.Tensor], target: Path) -> Any:
    """The model in bfloat16 with the products in its weights, saved by transformers and loaded again."""
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if "scale" not in n}
    tensors |= {name: product.bfloat16() for name, product in products.items()}
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    pico.save_tokenizer(target)
    return getattr(transformers, config["architectures"][0]).from_pretrained(target).eval()


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("shape", [(48, 32), (40, 20)])
def test_weights_are_numbers_times_scales(layout: str, shape: tuple[int, int]) -> None:
    numbers, scale, products = quantise(torch.randn(shape), layout)
    found = dequantise("w", numbers, scale, BLOCK if layout == "block" else None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), products, rtol=1e-6, atol=0)
    if layout != "tensor":  # control: the scales of other blocks
        assert not torch.allclose(
            dequantise("w", numbers, scale.flip(0), BLOCK if layout == "block" else None).double(), products, rtol=0.01
        )


def test_stacks_of_experts_have_a_grid_for_each() -> None:
    parts = [quantise(torch.randn(32, 24), "block") for _ in range(3)]
    numbers, scale = (torch.stack([part[i] for part in parts]) for i in (0, 1))
    found = dequantise("w", numbers, scale, BLOCK)
    torch.testing.assert_close(found.double(), torch.stack([part[2] for part in parts]), rtol=1e-6, atol=0)


def test_blocks_that_divide_the_weight_need_no_size_and_others_that_do_not_fit_are_refused() -> None:
    numbers, scale, products = quantise(torch.randn(48, 32), "block")
    torch.testing.assert_close(dequantise("w", numbers, scale).double(), products, rtol=1e-6, atol=0)
    with pytest.raises(MismatchError, match=r"scales of w have the shape \[3, 4\].* in blocks of 24 x 8 need \[2, 4\]"):
        dequantise("w", numbers, scale, (24, 8))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_checkpoint_is_read_one_tensor_at_a_time_as_full_precision(layout: str, tmp_path: Path) -> None:
    products = save_fp8(tmp_path, layout)
    opened = open_base(str(tmp_path))
    assert opened.dequantised
    stored = load_file(tmp_path / "model.safetensors")
    assert set(opened.tensors.names()) == {name for name in stored if "scale" not in name}
    weights = opened.weights()
    assert weights.ignored == []
    for name in weights.stored_names():
        before = opened.tensors.bytes_read
        (tensor,) = weights.load([name]).values()
        expected = products[name].bfloat16() if name in products else stored[name]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected)
        scales = [stored[n] for n in (f"{name}_scale", f"{name}_scale_inv") if n in stored]
        assert opened.tensors.bytes_read - before == sum(t.nbytes for t in (stored[name], *scales))
        into = torch.empty(tensor.nbytes, dtype=torch.uint8)
        assert torch.equal(opened.tensors.read(name, into), expected)
        assert torch.equal(into.view(torch.bfloat16).view(expected.shape), expected)
    opened.tensors.close()


def test_transformers_reads_the_same_weights_where_it_dequantises(tmp_path: Path) -> None:
    """It takes blocks to divide the weight evenly, as they do here; those of `test_weights_are_numbers…` need not."""
    save_fp8(tmp_path, "block")
    options = {"weight_block_size": BLOCK, "dequantize": True}
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.FineGrainedFP8Config(**options), dtype=torch.bfloat16
    )
    opened = open_base(str(tmp_path))
    weights = opened.weights()
    loaded = weights.load(weights.stored_names())
    opened.tensors.close()
    assert loaded.keys() == dict(model.named_parameters()).keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_every_stage_takes_an_fp8_base_and_equals_the_full_precision_one(tmp_path: Path) -> None:
    products = save_fp8(tmp_path / "fp8", "block", "qwen3-moe")
    model = in_memory(tmp_path / "fp8", products, tmp_path / "plain")
    data, ids = pico.save_texts(tmp_path / "data.jsonl", count=3), torch.tensor([[5, 9, 40, 77, 13]])
    for name in ("fp8", "plain"):
        base = str(tmp_path / name)
        calibrate(base=base, data=data, output=tmp_path / f"{name}-calibration", max_length=16, device="cpu")
        build_emulator(
            base=base, calibration=tmp_path / f"{name}-calibration", ratio=0.5, output=tmp_path / f"{name}-emulator"
        )
    one, other = (load_file(tmp_path / f"{name}-emulator" / "model.safetensors") for name in ("fp8", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "quantization_config" not in json.loads((tmp_path / "fp8-emulator" / "config.json").read_text())
    assert load_emulator(tmp_path / "fp8-emulator").dtype == torch.bfloat16

    pico.save_lora(tmp_path / "lora", tmp_path / "fp8-emulator", target_modules=["q_proj", "o_proj"])
    for name in ("fp8", "plain"):  # an emulator of one fits the other: the weights are the same
        base = str(tmp_path / name)
        options: dict[str, Any] = {"emulator": tmp_path / "fp8-emulator", "adapter": tmp_path / "lora", "base": base}
        correct(**options, output=tmp_path / f"{name}-corrected")
        merge(base=base, adapter=tmp_path / f"{name}-corrected", output=tmp_path / f"{name}-merged")
    one, other = (load_file(tmp_path / f"{name}-merged" / "model.safetensors") for name in ("fp8", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    merged = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "fp8-merged").eval()
    assert merged.dtype == torch.bfloat16
    assert not torch.equal(merged(ids).logits, model(ids).logits)


def test_eight_bits_without_scales_are_refused_by_name(tmp_path: Path) -> None:
    save_fp8(tmp_path, "block")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    opened = open_base(str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj\.weight has 8-bit numbers and no scales"):
        opened.weights().load(["model.layers.1.mlp.up_proj.weight"])
    opened.tensors.close()


# Configurations of what is refused, and what the message calls it.
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "gptq", "bits": 5}, "gptq (bits 5)"),
    (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "gptq (checkpoint_format marlin, bits 4)",
    ),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq (version gemv, bits 4)"),
    ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8 (expert_dtype fp4)"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "modelopt (quant_algo NVFP4_AWQ)"),
    ({**TENSORWISE, "format": "marlin-24"}, "compressed-tensors (format marlin-24)"),
    (
        {**TENSORWISE, "sparsity_config": {"format": "sparse-24-bitmask"}},
        "compressed-tensors (format float-quantized, sparsity sparse-24-bitmask)",
    ),
    (
        {**TENSORWISE, "transform_config": {"config_groups": {"R1": {}}}},
        "compressed-tensors (format float-quantized, transforms R1)",
    ),
    (
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:fp8_static"},
        "auto-round (packing_format auto_round:fp8_static, bits 4)",
    ),
    ({"quant_method": "hqq"}, "hqq"),
    ({"bits": 4}, "an unknown method (bits 4)"),
]


@pytest.mark.parametrize(("quantisation", "called"), OTHERS, ids=[called for _, called in OTHERS])
def test_other_quantisations_are_refused_by_their_name(
    quantisation: dict[str, Any], called: str, tmp_path: Path
) -> None:
    pico.save_model(tmp_path)
    edit(tmp_path, quantization_config=quantisation)
    with pytest.raises(UnsupportedError, match=rf"is quantised by {re.escape(called)}; use the model's full-precision"):
        open_base(str(tmp_path))


def test_exponents_are_no_factors(tmp_path: Path) -> None:
    """MXFP8 has bytes for scales. Read as factors, 127 would be taken for 127 and not for 1."""
    mxfp8 = {"type": "float", "num_bits": 8, "strategy": "group", "group_size": 32}
    config = {**TENSORWISE, "format": "mxfp8-quantized", "config_groups": {"group_0": {"weights": mxfp8}}}
    assert is_fp8(TENSORWISE)
    assert not is_fp8(config)
    with pytest.raises(UnsupportedError, match=r"the scales of w are torch\.uint8, and factors are floats"):
        dequantise("w", torch.ones(2, 32).to(F8), torch.full((2, 1), 127, dtype=torch.uint8))


def test_a_dequantised_folder_shows_what_it_gives_and_hides_the_scales(tmp_path: Path) -> None:
    save_fp8(tmp_path, "row")
    raw = TensorFolder.of_files([tmp_path / "model.safetensors"])
    folder = Fp8Folder(raw, None, torch.bfloat16)
    folder.check_placement()
    spec = folder.spec("model.layers.0.self_attn.q_proj.weight")
    assert (spec.dtype, spec.shape) == (torch.bfloat16, (32, 32))
    assert "model.layers.0.self_attn.q_proj.weight_scale" not in folder
    folder.close()
