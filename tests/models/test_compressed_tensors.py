"""Checkpoints of compressed-tensors and ModelOpt's NVFP4 are read by their definition, and damaged ones refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.base import open_base
from emloc_tools.models.quantised import compressed_tensors_weights
from emloc_tools.models.quantised.compressed_tensors_weights import CompressedTensorsFolder
from tests import pico
from tests.models.bit_sequences import bits_of, pack_rows
from tests.models.quantised_stages import require_equal_stages, save_plain

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
INT4: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}
FP4: dict[str, Any] = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
MX: dict[str, Any] = {"type": "float", "group_size": 32, "strategy": "group", "scale_dtype": torch.uint8}
DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True}
KINDS: dict[str, dict[str, Any]] = {
    "int4-groups": {"weights": INT4},
    "int4-symmetric": {"weights": {**INT4, "symmetric": True}},
    "int3-channels": {"weights": {"num_bits": 3, "strategy": "channel", "symmetric": False}},
    "int8-tensor": {"weights": {"num_bits": 8, "strategy": "tensor"}},
    "w8a8": {"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": DYNAMIC},
    "w8a8-asymmetric": {
        "weights": {"num_bits": 8, "strategy": "channel", "symmetric": False},
        "input_activations": DYNAMIC,
    },
    "nvfp4": {"weights": FP4},
    "mxfp4": {"weights": {**MX, "num_bits": 4}},
    "mxfp6": {"weights": {**MX, "num_bits": 6}},
    "mxfp8": {"weights": {**MX, "num_bits": 8}},
}
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def group(kind: str) -> dict[str, Any]:
    return {"targets": ["Linear"], **KINDS[kind]}


def save(folder: Path, groups: dict[str, dict[str, Any]]) -> str:
    """A Llama as the library compresses it, with scales of the largest number of each group and random zero points."""
    sizes = {**pico.LLAMA, "hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16()
    model.save_pretrained(folder)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            set_scales(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(str(folder))
    pico.save_tokenizer(folder)
    return str(folder)


def set_scales(module: Any) -> None:
    args, W = module.quantization_scheme.weights, module.weight.detach().float()
    width = W.shape[1] // module.weight_scale.shape[-1] if module.weight_scale.dim() == 2 else W.numel()
    largest = W.reshape(-1, width).abs().amax(dim=1).reshape(module.weight_scale.shape)
    if args.strategy == "tensor_group":
        module.weight_global_scale.data = (448 * 6 / W.abs().max()).reshape(1)
        largest *= module.weight_global_scale
    elif args.strategy == "tensor":
        largest = W.abs().max().reshape(module.weight_scale.shape)
    top = {4: 6.0, 6: 7.5, 8: 448.0}[args.num_bits] if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    module.weight_scale.data = (largest / top).to(module.weight_scale.dtype)
    if not args.symmetric:
        zeros = torch.randint(-2, 3, module.weight_zero_point.shape)
        module.weight_zero_point.data = zeros.to(module.weight_zero_point.dtype)


def small_floats(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Floats of one sign bit, two bits of exponent, and the rest of fraction."""
    fraction_bits = bits - 3
    sign = 1 - 2.0 * (numbers >> (bits - 1)).double()
    exponent = (numbers >> fraction_bits) & 3
    fraction = (numbers & ((1 << fraction_bits) - 1)).double() / (1 << fraction_bits)
    normal = (1 + fraction) * 2.0 ** (exponent.double() - 1)
    return sign * torch.where(exponent == 0, fraction, normal)


def reference(stored: Tensors, name: str, args: dict[str, Any]) -> torch.Tensor:
    """A quantised weight in float64 by the definition of its format."""
    bits, scale = args["num_bits"], stored[f"{name}_scale"]
    exponents = scale.dtype == torch.uint8
    scales = 2.0 ** (scale.double() - 127) if exponents else scale.double()
    if f"{name}_global_scale" in stored:
        scales = scales / stored[f"{name}_global_scale"].double()
    if args.get("type") == "float":
        numbers = stored[name].double() if bits == 8 else small_floats(bits_of(stored[f"{name}_packed"], bits), bits)
    elif name in stored:
        numbers = stored[name].double() - stored.get(f"{name}_zero_point", torch.zeros(1)).double()
    else:
        rows, columns = stored[f"{name}_shape"].tolist()
        zeros = torch.full((rows, 1), 2 ** (bits - 1))
        if f"{name}_zero_point" in stored:
            zeros = bits_of(stored[f"{name}_zero_point"].T, bits)[:, :rows].T
        numbers = bits_of(stored[f"{name}_packed"], bits)[:, :columns].double()
        numbers = numbers - zeros.double().repeat_interleave(columns // zeros.shape[1], dim=1)
    return numbers * scales.reshape(-1, scales.shape[-1]).repeat_interleave(numbers.shape[1] // scales.shape[-1], dim=1)


def test_the_reference_of_small_floats_is_the_published_table() -> None:
    assert small_floats(torch.arange(8), 4).tolist() == list(FP4_VALUES)
    assert small_floats(torch.tensor([0b011111, 0b100001]), 6).tolist() == [7.5, -0.125]  # of E2M3


@pytest.mark.parametrize("rows_at_once", ["all", "32"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_are_what_the_format_defines(
    kind: str, rows_at_once: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows_at_once == "32":
        monkeypatch.setattr(compressed_tensors_weights, "AT_ONCE", 1)
    opened, stored = open_base(save(tmp_path, {"group_0": group(kind)})), load_file(tmp_path / "model.safetensors")
    weights = opened.weights()
    assert opened.dequantised
    assert weights.ignored == []
    layers = [name for name in weights.stored_names() if "_proj" in name]
    assert len(layers) == 21  # seven in each of three blocks
    for name in layers:
        before = opened.tensors.bytes_read
        (found,) = weights.load([name]).values()
        own = sum(t.nbytes for part, t in stored.items() if part == name or part.startswith(f"{name}_"))
        shape = stored[f"{name}_shape"].nbytes if f"{name}_shape" in stored else 0
        assert opened.tensors.bytes_read - before <= own + shape  # each tensor alone
        expected = reference(stored, name, KINDS[kind]["weights"])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)  # half a unit of bfloat16's last place
        assert not torch.allclose(found.double(), expected.flip(0), rtol=0.1)  # control: other rows
    assert torch.equal(opened.tensors.read("lm_head.weight"), stored["lm_head.weight"])
    opened.tensors.close()


def test_each_group_of_a_mixed_checkpoint_is_read_by_its_own_scheme(tmp_path: Path) -> None:
    attention = {**KINDS["w8a8"], "targets": ["re:.*self_attn.*"]}
    base = save(tmp_path, {"group_0": group("int4-groups"), "group_1": attention})
    stored, opened = load_file(tmp_path / "model.safetensors"), open_base(base)
    for name, kind in ((UP, "int4-groups"), ("model.layers.0.self_attn.k_proj.weight", "w8a8")):
        expected = reference(stored, name, KINDS[kind]["weights"])
        torch.testing.assert_close(opened.tensors.read(name).double(), expected, rtol=2**-8, atol=0)
    opened.tensors.close()
    config = json.loads((tmp_path / "config.json").read_text())
    for part in config["quantization_config"]["config_groups"].values():
        part["targets"] = ["re:.*gate_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="up_proj is quantised, and none of the groups"):
        open_base(base).tensors.read(UP)


def test_transformers_reads_the_same_weights_and_every_stage_those_of_full_precision(tmp_path: Path) -> None:
    base = save(tmp_path / "quantised", {"group_0": group("int4-symmetric")})
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        base, quantization_config=transformers.CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    opened = open_base(base)
    for name, tensor in tensors.items():
        assert torch.equal(opened.tensors.read(name), tensor), name
    opened.tensors.close()
    plain = save_plain(tmp_path / "plain", tmp_path / "quantised", tensors)
    corrected = require_equal_stages(base, plain, tmp_path)

    ids = torch.tensor([[5, 9, 40, 77, 13]])
    logits = {}
    for name in (base, plain):  # the LoRA loads on the quantised model, too
        loaded: Any = transformers.LlamaForCausalLM.from_pretrained(name)
        with torch.no_grad():
            without = loaded(ids).logits
            logits[name] = peft.PeftModel.from_pretrained(loaded, str(corrected))(ids).logits
        assert not torch.equal(logits[name], without)  # control
    torch.testing.assert_close(logits[base], logits[plain])


def test_an_order_by_activation_and_an_incomplete_last_group_choose_each_columns_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What older releases of the library wrote, and current ones no longer do: so it is packed here."""
    monkeypatch.setattr(compressed_tensors_weights, "AT_ONCE", 1)  # 32 rows at a time
    rows, columns = 40, 50
    numbers, zeros = torch.randint(16, (rows, columns)), torch.randint(16, (rows, 4))
    scales, order = torch.rand(rows, 4) + 0.1, torch.randint(4, (columns,))
    stored = {
        "a.weight_packed": pack_rows(numbers, 4),
        "a.weight_zero_point": pack_rows(zeros.T, 4).T.contiguous(),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([rows, columns]),
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": INT4}},
    }
    in_turn, unset = torch.arange(columns) // 16, torch.full((columns,), -1, dtype=torch.int32)
    indices = ((order, {"a.weight_g_idx": order.int()}), (in_turn, {}), (in_turn, {"a.weight_g_idx": unset}))
    for index, given in indices:
        save_file({**stored, **given}, tmp_path / "model.safetensors")
        with folder(tmp_path, config) as opened:
            found = opened.read("a.weight").double()
        expected = (numbers - zeros[:, index]) * scales.double()[:, index]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert not torch.allclose(found, expected[:, torch.randperm(columns)])
    save_file({**stored, "a.weight_g_idx": order.int() + 1}, tmp_path / "model.safetensors")
    with folder(tmp_path, config) as opened, pytest.raises(MismatchError, match="each of 50 columns one of 4 groups"):
        opened.read("a.weight")


def folder(path: Path, quantisation: dict[str, Any], dtype: torch.dtype = torch.float32) -> CompressedTensorsFolder:
    return CompressedTensorsFolder(TensorFolder.of_files([path / "model.safetensors"]), quantisation, dtype)


def test_nvfp4_of_modelopt_is_the_same_under_other_names(tmp_path: Path) -> None:
    packed = torch.randint(256, (32, 24), dtype=torch.uint8)
    scales = (torch.rand(32, 3) * 400).to(torch.float8_e4m3fn)
    extra = {"a.input_scale": torch.ones(()), "a.k_scale": torch.ones(())}
    stored = {"a.weight": packed, "a.weight_scale": scales, "a.weight_scale_2": torch.tensor(0.003)}
    save_file(stored | extra | {"b.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with folder(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, torch.bfloat16) as opened:
        assert opened.names() == ["a.weight", "b.weight"]
        assert opened.spec("a.weight").shape == (32, 48)
        found = opened.read("a.weight").double()
    expected = small_floats(bits_of(packed, 4), 4) * scales.double().repeat_interleave(16, dim=1) * 0.003
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)
    assert not torch.allclose(found, expected.flip(1), rtol=0.1)  # control


DAMAGES: dict[str, tuple[str, Callable[[Tensors], Any], type[Exception], str]] = {
    "short": (
        "int4-groups",
        lambda t: t.update({f"{UP}_packed": t[f"{UP}_packed"][:, 1:].clone()}),
        MismatchError,
        r"up_proj\.weight_packed is torch\.int32 of shape \[128, 7\], where torch\.int32 \[128, 8\] belongs",
    ),
    "scales": (
        "int4-groups",
        lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale"][1:].clone()}),
        MismatchError,
        r"weight_scale is torch\.\w+ of shape \[127, 4\], where \[128, 4\] belongs",
    ),
    "no-scales": ("int4-groups", lambda t: t.pop(f"{UP}_scale"), MismatchError, rf"{UP} lacks {UP}_scale"),
    "zeros": ("int4-groups", lambda t: t.pop(f"{UP}_zero_point"), MismatchError, rf"{UP} lacks {UP}_zero_point"),
    "shape": (
        "int4-groups",
        lambda t: t.update({f"{UP}_shape": torch.tensor([128, -64])}),
        MismatchError,
        "_shape is .128, -64., where rows and columns belong",
    ),
    "global": ("nvfp4", lambda t: t.pop(f"{UP}_global_scale"), MismatchError, rf"{UP} lacks {UP}_global_scale"),
    "alone": ("w8a8", lambda t: t.pop(f"{UP}_scale"), UnsupportedError, f"{UP} has 8-bit numbers and no {UP}_scale"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_parts_that_do_not_fit_are_refused_before_the_library_sees_them(damage: str, tmp_path: Path) -> None:
    kind, change, error, message = DAMAGES[damage]
    base, tensors = save(tmp_path, {"group_0": group(kind)}), load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = open_base(base)
    assert opened.tensors.read(UP.replace("up", "gate")).shape == (128, 64)  # control: the others are whole
    with pytest.raises(error, match=message):
        opened.tensors.read(UP)
    opened.tensors.close()


def test_a_shape_that_is_not_stored_is_what_the_words_hold(tmp_path: Path) -> None:
    numbers = torch.randint(16, (8, 32))
    stored = {"a.weight_packed": pack_rows(numbers, 4), "a.weight_scale": torch.full((8, 2), 0.5)}
    save_file(stored, tmp_path / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {**INT4, "symmetric": True}}}}
    with folder(tmp_path, config) as opened:
        assert torch.equal(opened.read("a.weight"), (numbers - 8) * 0.5)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path, {"group_0": group("int4-groups")})
    open_base(base).tensors.close()
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UnsupportedError, match=r'that compressed-tensors reads, .*"emloc-tools\[compressed-tensors\]"'):
        open_base(base)
