"""Masks of real tokens apply to the rows of those tokens, and to no others that happen to be as many."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from emloc_tools.data.batches import Batch
from emloc_tools.streaming.padding import Padding, real_rows, real_slots

MASK = torch.tensor([[True, True, False], [True, False, False]])
REAL = [0, 1, 3]  # its rows


@pytest.mark.parametrize("leading", [(2, 3), (6,), (2, 1, 3), (1, 2, 3)])
def test_rows_of_the_mask_s_shape_are_chosen_by_it(leading: tuple[int, ...]) -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(real_rows(rows.reshape(*leading, 2), MASK), rows[REAL])


@pytest.mark.parametrize("leading", [(3, 2), (1, 6), (7,), (2, 4)])
def test_rows_of_another_shape_are_all_real(leading: tuple[int, ...]) -> None:
    rows = torch.randn(*leading, 2)
    assert torch.equal(real_rows(rows, MASK), rows.reshape(-1, 2))


def test_rows_are_copies() -> None:
    x = torch.zeros(2, 3, 2)
    for mask in (MASK, None):
        real_rows(x, mask).add_(1)
    assert not x.any()


def test_slots_are_real_where_their_tokens_are() -> None:
    tokens = torch.tensor([5, 3, 1, 3])
    x = torch.randn(4, 2)
    assert torch.equal(real_slots(x, MASK, tokens, of=6), x[[1, 2, 3]])
    assert torch.equal(real_slots(x, MASK, tokens, of=7), x)


def padding_of(model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None) -> Padding:
    """The padding of one batch, which runs once."""
    return Padding(SimpleNamespace(model=model, current=0), [Batch(inputs, mask, None)])  # type: ignore[arg-type]


@pytest.fixture
def t5() -> Any:
    """An encoder with a decoder."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=16, **sizes)).eval()


def masks_by_layer(model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None) -> dict[str, Any]:
    """The masks that the layers of a model are given in its forward, and once more without what they read."""
    padding, found = padding_of(model, inputs, mask), {}

    def hook(name: str) -> Any:
        return lambda module, args, output: found.__setitem__(name, padding.mask(0, name, args[0]))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model(**inputs, **({} if mask is None else {"attention_mask": mask.long()}))
    padding.close()
    for name, expected in found.items():
        assert padding.mask(0, name) is expected, name
    return found


def test_encoder_and_decoder_have_masks_of_their_own(t5: Any) -> None:
    labels = torch.tensor([[3, 4, 5], [6, -100, -100]])
    found = masks_by_layer(t5, {"input_ids": torch.full((2, 3), 7), "labels": labels}, MASK)
    for name, mask in found.items():
        reads_encoder = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        if name.startswith("encoder.") or reads_encoder:
            assert mask is MASK, name
        else:
            assert torch.equal(mask, torch.tensor([[True] * 3, [True, False, False]])), name
    assert len(found) > 15


def test_a_decoder_s_own_mask_comes_before_its_labels(t5: Any) -> None:
    own = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = {"input_ids": torch.full((2, 3), 7), "labels": torch.full((2, 3), 4), "decoder_attention_mask": own}
    found = masks_by_layer(t5, inputs, None)
    assert torch.equal(found["decoder.block.0.layer.0.SelfAttention.q"], own.bool())
    assert found["encoder.block.0.layer.0.SelfAttention.q"] is None


def test_a_label_that_is_left_out_before_another_one_is_no_padding(t5: Any) -> None:
    labels = torch.tensor([[-100, 4, -100], [3, -100, 5]])
    mask = padding_of(t5, {"labels": labels}, None).mask(0, "decoder.block.0.layer.0.SelfAttention.q")
    assert torch.equal(mask, torch.tensor([[True, True, False], [True, True, True]]))  # type: ignore[arg-type]


def test_towers_for_images_have_no_padding_of_tokens() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**sizes, "vocab_size": 16}, vision_config={**sizes, "image_size": 8, "patch_size": 4}
        )
    )
    padding = padding_of(model, {}, MASK)
    assert padding.mask(0, "vision_model.encoder.layers.0.mlp.fc1") is None
    assert padding.mask(0, "text_model.encoder.layers.0.mlp.fc1") is MASK


def test_without_an_encoder_the_mask_holds_everywhere() -> None:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    padding = padding_of(transformers.LlamaForCausalLM(config), {"labels": torch.full((2, 3), -100)}, MASK)
    assert padding.mask(0, "model.layers.0.mlp.up_proj") is MASK
    assert padding_of(torch.nn.Linear(2, 2), {}, MASK).mask(0, "") is MASK
