"""LoRA pairs hooked into a model compute what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from emloc_tools.errors import MismatchError
from emloc_tools.files.adapter import Adapter
from emloc_tools.models.lora import LoraPair, attach_loras, match_module
from tests import pico
from tests.streaming.streamed import batches, in_memory, open_stream


def save_adapter(folder: Path, base: Path, *, seed: int, **options: Any) -> None:
    """A LoRA on a base with random A and B."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options})
    adapted = peft.get_peft_model(in_memory(base), config)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)


def pairs(folder: Path) -> dict[str, LoraPair]:
    """The pairs of an adapter folder, as `evaluate` takes them."""
    adapter = Adapter(folder)
    found = {module: LoraPair(*adapter.pair(module), keys.scaling) for module, keys in adapter.loras.items()}
    adapter.close()
    return found


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits without a graph."""
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=["lora", "rslora"])
def test_hooked_pairs_equal_the_peft_model(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", family)
    save_adapter(tmp_path / "adapter", tmp_path / "base", seed=1, **options)
    base = in_memory(tmp_path / "base")
    plain = [logits(base, inputs) for inputs in batches()]
    adapted = peft.PeftModel.from_pretrained(in_memory(tmp_path / "base"), tmp_path / "adapter")
    expected = [logits(adapted, inputs) for inputs in batches()]

    chosen: int | None = 0
    handles = attach_loras(base, [pairs(tmp_path / "adapter")], lambda: chosen)
    for inputs, one, without in zip(batches(), expected, plain, strict=True):
        # PEFT scales in another order, so sums differ in their last bits.
        torch.testing.assert_close(logits(base, inputs), one, rtol=1e-4, atol=1e-4)
        assert float((one - without).abs().max()) > 0.1  # control: the adapter matters
    chosen = None
    assert torch.equal(logits(base, batches()[0]), plain[0])
    chosen = 0
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(base, batches()[0]), plain[0])


def test_each_streamed_batch_has_the_adapter_that_it_was_given(tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(tmp_path / f"adapter-{seed}", tmp_path / "base", seed=seed, target_modules=["q_proj", "up_proj"])
    inputs = batches()[0]
    expected = [logits(in_memory(tmp_path / "base"), inputs)]
    for seed in (1, 2):
        adapted = peft.PeftModel.from_pretrained(in_memory(tmp_path / "base"), tmp_path / f"adapter-{seed}")
        expected.append(logits(adapted, inputs))

    stream = open_stream(tmp_path / "base")
    given = [None, 0, 1]
    attach_loras(stream.model, [pairs(tmp_path / f"adapter-{seed}") for seed in (1, 2)], lambda: given[stream.current])
    results: dict[int, torch.Tensor] = {}
    stream.run([lambda: stream.model(**inputs).logits] * 3, results.__setitem__)
    for index, one in enumerate(expected):
        torch.testing.assert_close(results[index], one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[1], results[2], atol=0.01)


def test_the_product_is_taken_in_float32_and_the_output_keeps_its_dtype(tmp_path: Path) -> None:
    linear = torch.nn.Linear(64, 8, bias=False).to(torch.bfloat16)
    x, pair = torch.randn(5, 64).bfloat16(), LoraPair(torch.randn(4, 64), torch.randn(8, 4), 1.5)
    with torch.no_grad():
        before = linear(x)
        attach_loras(torch.nn.ModuleDict({"a": linear}), [{"a": pair}], lambda: 0)
        after = linear(x)
    gain = 1.5 * (x.double() @ pair.A.double().T @ pair.B.double().T)
    assert after.dtype == torch.bfloat16
    # One rounding of the gain and one of the sum, each of half a unit in the eighth bit.
    bound = (gain.abs() + (before.double() + gain).abs()) * 2**-8 * 1.01
    assert bool(((after.double() - before.double() - gain).abs() <= bound).all())


def test_a_pair_that_fits_no_module_is_refused(tmp_path: Path) -> None:
    model = in_memory_llama(tmp_path)
    pair = LoraPair(torch.zeros(2, 32), torch.zeros(32, 2), 1.0)
    with pytest.raises(MismatchError, match=r"the adapter's module model\.layers\.9\.mlp is not in LlamaForCausalLM"):
        attach_loras(model, [{"model.layers.9.mlp": pair}], lambda: 0)


def in_memory_llama(folder: Path) -> Any:
    """A saved and loaded pico Llama."""
    pico.save_model(folder)
    return in_memory(folder)


def test_modules_match_by_name_or_by_a_prefix_that_is_unambiguous() -> None:
    modules = ["model.layers.0.up", "model.layers.1.up", "vision.layers.1.up", "head"]
    assert match_module("head", modules) == "head"
    assert match_module("layers.0.up", modules) == "model.layers.0.up"
    assert match_module("base.model.layers.0.up", modules) == "model.layers.0.up"
    assert match_module("layers.1.up", modules) is None  # two fit
    assert match_module("s.0.up", modules) is None
