"""Factors that bitsandbytes holds in 4 bits: computing with them, training through them, and the names of adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from torch.nn import functional as F

from emloc_tools import load_emulator
from emloc_tools.models import four_bits
from emloc_tools.models.four_bits import FourBits
from emloc_tools.models.lowrank_layers import LowRankLinear
from emloc_tools.models.lowrank_modules import factor_layers
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import correct
from tests import pico
from tests.conftest import Run

NF4 = FourBits("nf4", False, torch.uint8, torch.float32)
IDS = torch.arange(5, 21)[None]
EPS = torch.finfo(torch.float32).eps
UP = "model.layers.1.mlp.up_proj"


def one_line(**options: Any) -> transformers.BitsAndBytesConfig:
    """What a user passes as `quantization_config`."""
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def loaded(folder: Path, **options: Any) -> Any:
    """An emulator in 4 bits, by the code in its folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, quantization_config=one_line(**options)
    )


def unpacked(module: Any, name: str) -> torch.Tensor:
    """A quantised factor in float64, by the definition: a table's entry times the scale of its block of 64."""
    weight = getattr(module, name)
    state, packed = weight.quant_state, weight.data.flatten().long()
    entries = state.code.double()[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    shape = (module.out_features, module.rank) if name == "U" else (module.rank, module.in_features)
    return (entries * state.absmax.double().repeat_interleave(64))[: shape[0] * shape[1]].view(shape)


def layer(bias: bool = True, four_bits: FourBits | None = NF4) -> LowRankLinear:
    """A layer of rank 10 from 30 to 50 features: neither matrix is a whole number of blocks."""
    new = LowRankLinear(30, 50, 10, bias=bias)
    new.four_bits = four_bits
    torch.manual_seed(1)
    for name, shape in (("U", (50, 10)), ("S", (10,)), ("Vh", (10, 30))):
        setattr(new, name, torch.nn.Parameter(torch.randn(shape), requires_grad=False))
    if bias:
        new.bias.data = torch.randn(50)
    return new


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_dequantised_factors(bias: bool) -> None:
    packed, stored = layer(bias), layer(bias, four_bits=None)
    x, back = torch.randn(2, 7, 30, requires_grad=True), torch.randn(2, 7, 50)
    y = packed(x)
    (gradient,) = torch.autograd.grad(y, x, back)
    W = unpacked(packed, "U") @ torch.diag(packed.S.double()) @ unpacked(packed, "Vh")
    expected = F.linear(x.detach().double(), W, packed.bias.double() if bias else None)
    expected_gradient = back.double() @ W
    assert (y - expected).abs().max() <= 50 * EPS * expected.abs().max()
    assert (gradient - expected_gradient).abs().max() <= 50 * EPS * expected_gradient.abs().max()
    # The factors as they were stored compute something else.
    assert (stored(x) - expected).abs().max() > 0.01 * expected.abs().max()


def test_a_factor_takes_half_a_byte_for_each_number() -> None:
    packed = layer()
    assert [packed.U.nbytes, packed.Vh.nbytes] == [8 * 64 // 2, 5 * 64 // 2]  # whole blocks of 500 and 300 numbers
    assert packed.U.quant_state.absmax.numel() == 8  # a scale for each
    assert packed.S.dtype == torch.float32


def test_the_dense_factors_are_not_kept_for_the_backward_pass() -> None:
    """Else every layer's would be there at once at the end of a forward pass, and nothing would be saved."""

    def largest_kept(module: LowRankLinear) -> int:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
            module(torch.randn(1, 30, requires_grad=True))
        return max(kept)

    assert largest_kept(layer(bias=False, four_bits=None)) == 50 * 10 * 4
    assert largest_kept(layer(bias=False)) <= 8 * 64 // 2


def test_the_weight_says_the_dtype_that_it_had_and_gives_the_dequantised_product() -> None:
    packed = layer()
    assert packed.weight.dtype == torch.float32  # a LoRA takes it for its own; that of the packed numbers is uint8
    W = unpacked(packed, "U") @ torch.diag(packed.S.double()) @ unpacked(packed, "Vh")
    assert (packed.weight + 0 - W).abs().max() <= 50 * EPS * W.abs().max()


def test_one_line_loads_an_emulator_in_4_bits(run: Run) -> None:
    model = loaded(run.emulator, bnb_4bit_use_double_quant=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert type(layers.pop("lm_head")) is torch.nn.Linear
    own = load_emulator(run.emulator)
    for name, module in layers.items():
        assert type(module).__name__ == "LowRankLinear"
        for factor in ("U", "Vh"):
            packed, stored = getattr(module, factor), getattr(own.get_submodule(name), factor)
            assert packed.nbytes == -(-stored.numel() // 64) * 32
            assert 0 < (module._factor(factor) - stored).abs().max() < 0.3 * stored.abs().max()
    assert model.is_loaded_in_4bit


def test_a_whole_model_computes_with_the_dequantised_factors(run: Run) -> None:
    model, reference = loaded(run.emulator), load_emulator(run.emulator)
    with torch.no_grad():
        stored = reference(IDS).logits
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                for factor in ("U", "Vh"):
                    getattr(reference.get_submodule(name), factor).copy_(unpacked(module, factor))
        expected, found = reference(IDS).logits, model(IDS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (stored - expected).abs().max() > 0.01 * expected.abs().max()


def test_layers_that_stayed_dense_are_in_4_bits_too(run: Run, tmp_path: Path) -> None:
    build_emulator(
        base=str(run.base), calibration=run.calibration, ratio=0.5, exclude=r".*down_proj", output=tmp_path / "e"
    )
    model = loaded(tmp_path / "e")
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules() if "mlp." in name}
    assert issubclass(kinds["down_proj"], Linear4bit)
    assert kinds["up_proj"].__name__ == "LowRankLinear"


def test_layers_to_skip_stay_as_they_are(run: Run) -> None:
    model = loaded(run.emulator, llm_int8_skip_modules=["lm_head", "layers.1.mlp"])
    assert model.get_submodule(UP).U.dtype == torch.float32
    assert model.get_submodule(UP.replace("1", "0")).U.dtype == torch.uint8


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_a_lora_has_the_tensors_of_one_on_the_base(run: Run, targets: Any) -> None:
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")

    def shapes(model: Any) -> dict[str, Any]:
        state = peft.get_peft_model_state_dict(peft.get_peft_model(model, config))
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    base = transformers.AutoModelForCausalLM.from_pretrained(run.base)
    assert shapes(loaded(run.emulator)) == shapes(base)


def test_prepared_and_trained_a_lora_is_corrected_for_the_base(run: Run, tmp_path: Path) -> None:
    """PEFT's preparation turns S into float32, beside activations in bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        run.emulator,
        trust_remote_code=True,
        dtype=torch.bfloat16,
        quantization_config=one_line(bnb_4bit_compute_dtype=torch.bfloat16),
    )
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.get_submodule(UP).S.dtype == torch.float32
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(20):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "lora")
    correct(emulator=run.emulator, adapter=tmp_path / "lora", base=str(run.base), output=tmp_path / "corrected")
    base = transformers.AutoModelForCausalLM.from_pretrained(run.base)
    with torch.no_grad():
        before = base(IDS, labels=IDS).loss
        after = peft.PeftModel.from_pretrained(base, tmp_path / "corrected")(IDS, labels=IDS).loss
    assert after < before


def test_8_bits_are_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="can be loaded in 4 bits, not in 8"):
        transformers.AutoModelForCausalLM.from_pretrained(
            run.emulator,
            trust_remote_code=True,
            quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
        )


def test_transformers_4_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would put dense layers of 4 bits in the place of low-rank ones."""
    model = transformers.AutoModelForCausalLM.from_pretrained(run.base)
    model.config.quantization_config = one_line()
    # By the module that reads it: importing peft puts another object in the place of transformers.
    monkeypatch.setattr(four_bits.transformers, "__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"needs transformers 5, and this is 4\.57\.6"):
        factor_layers(model, {UP: 4})


def test_layers_that_transformers_replaces_are_refused(tmp_path: Path) -> None:
    model = pico.save_model(tmp_path, "gpt2")
    model.config.quantization_config = one_line()
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn is a Conv1D"):
        factor_layers(model, {"transformer.h.0.attn.c_attn": 4})


def test_a_copy_computes_the_same(run: Run) -> None:
    model = loaded(run.emulator)
    again = copy.deepcopy(model).to("cpu")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
