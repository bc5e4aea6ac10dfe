"""PEFT adapts an emulator's layers under the same keys as the base's, and cannot write into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from emloc_tools import load_emulator
from emloc_tools.models.lowrank_layers import LowRankLayer
from emloc_tools.stages.build_emulator import build_emulator
from tests import pico

CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj", "c_attn", "c_fc", "query", "dense"]},
    "regex": {"target_modules": r".*(layers|h|layer)\.[12]\..*(q_proj|up_proj|c_proj|value)"},
    "all-linear": {"target_modules": "all-linear"},
    "layers_to_transform": {"target_modules": ["v_proj", "c_fc", "key"], "layers_to_transform": [1]},
    "rank_pattern": {"target_modules": "all-linear", "rank_pattern": {".*1.*(up_proj|c_fc|key)": 7}},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "modules_to_save": {
        "target_modules": ["q_proj", "c_attn", "query"],
        "modules_to_save": ["norm", "ln_f", "LayerNorm"],
    },
}


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in bfloat16 and its emulator."""
    root = tmp_path_factory.mktemp(request.param)
    pico.save_model(root / "base", request.param, dtype=torch.bfloat16)
    build_emulator(base=str(root / "base"), ratio=0.5, output=root / "emulator")
    return root / "base", root / "emulator"


def base_model(folder: Path) -> Any:
    """The base in memory."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_adapters_have_the_keys_shapes_and_dtypes_of_the_base(kind: str, pair: tuple[Path, Path]) -> None:
    base, emulator = pair
    settings = {"r": 4, "lora_alpha": 6, **CONFIGS[kind]}
    states = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in peft.get_peft_model_state_dict(adapted).items()}
        for adapted in (
            peft.get_peft_model(model, peft.LoraConfig(**settings))
            for model in (base_model(base), load_emulator(emulator, dtype=torch.bfloat16))
        )
    ]
    assert states[0] == states[1]
    assert states[0]


def test_only_the_adapter_trains_and_gradients_reach_it(pair: tuple[Path, Path]) -> None:
    _, emulator = pair
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(load_emulator(emulator, dtype=torch.float32), config)
    wrapped = [m for m in adapted.modules() if isinstance(getattr(m, "base_layer", None), LowRankLayer)]
    assert len(wrapped) > 6
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # B starts at zero, and then A has no gradient
            nn.init.normal_(parameter)
    ids = torch.randint(4, 200, (2, 9))
    adapted(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_rewrite_the_base_fail_loudly(init: str, pair: tuple[Path, Path]) -> None:
    _, emulator = pair
    model = load_emulator(emulator, dtype=torch.float32)
    targets = ["q_proj", "c_attn", "query"]
    with pytest.raises(RuntimeError, match="its dense weight is derived and cannot be written"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=init))


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_into_an_emulator_fails_loudly(call: str, pair: tuple[Path, Path]) -> None:
    _, emulator = pair
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "c_attn", "query"])
    adapted = peft.get_peft_model(load_emulator(emulator, dtype=torch.float32), config)
    with pytest.raises(RuntimeError, match="Correct the adapter with `emloc-tools correct`"):
        getattr(adapted, call)()
    with pytest.raises(RuntimeError, match="cannot be written"):
        adapted.merge_and_unload(safe_merge=True)


def test_dora_uses_the_norm_of_the_product(pair: tuple[Path, Path]) -> None:
    _, emulator = pair
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "c_attn", "query"], use_dora=True)
    plain = load_emulator(emulator, dtype=torch.float32).eval()
    ids = torch.randint(4, 200, (2, 9))
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        adapted = peft.get_peft_model(load_emulator(emulator, dtype=torch.float32).eval(), config)
        # With B = 0 DoRA computes m W x / ‖W‖: the emulator's own output, if m is the norm of the product.
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
