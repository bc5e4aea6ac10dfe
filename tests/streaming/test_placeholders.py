"""A weight that is not loaded can be looked at; a model that computes with it gets it, and nobody else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from emloc_tools.errors import UnsupportedError
from emloc_tools.streaming.placeholders import Placeholder, Placeholders
from tests.streaming.streamed import checkpoint_bytes, stream_module


def placeholder() -> torch.Tensor:
    layer = nn.Linear(8, 8, device="meta")
    Placeholders([(layer, "weight", False, "weight")])
    assert isinstance(layer.weight, Placeholder)
    return layer.weight


X = torch.ones(3, 8)
USES: dict[str, Callable[[torch.Tensor], object]] = {
    "linear": lambda w: F.linear(X, w),
    "matmul of a view": lambda w: X @ w.T[:, 2:],
    "embedding": lambda w: F.embedding(torch.tensor([1]), w),
    "addition": lambda w: X + w[0],
    "list": lambda w: torch.cat([X, w]),
    "keyword": lambda w: F.layer_norm(X, (8,), weight=w[0]),
    "copy": lambda w: w.clone().copy_(torch.ones(8, 8)),
}


@pytest.mark.parametrize("use", list(USES))
def test_computing_with_a_weight_that_is_not_loaded_is_refused(use: str) -> None:
    with pytest.raises(UnsupportedError, match="that is not loaded"):
        USES[use](placeholder())


def test_torch_itself_would_multiply_with_it() -> None:
    """The control, and the reason for placeholders: the result is not on meta, though nobody knows the weight."""
    assert not F.linear(X, torch.empty(8, 8, device="meta")).is_meta


def test_a_weight_that_is_not_loaded_can_be_looked_at() -> None:
    w = placeholder()
    assert (w.shape, w.dtype, w.device.type, w.is_meta) == ((8, 8), torch.float32, "meta", True)
    assert (w.numel(), w.nbytes, w.dim(), w.requires_grad) == (64, 256, 2, True)
    assert isinstance(w, nn.Parameter)
    assert (w.T @ w).is_meta


class Borrows(nn.Module):
    """Uses the weight of a block without calling the block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor, borrow: bool) -> torch.Tensor:
        x = self.blocks[0](x)
        return F.linear(x, self.blocks[1].weight) if borrow else self.blocks[1](x)  # type: ignore[no-any-return, arg-type]


@pytest.mark.parametrize("borrow", [False, True])
def test_a_weight_whose_owner_is_not_called_is_loaded_for_the_model_alone(borrow: bool, tmp_path: Path) -> None:
    reference, stream = stream_module(Borrows, tmp_path)
    expected = [reference(x, borrow) for x in (X, 2 * X)]
    if borrow:
        assert not torch.equal(expected[0], reference(X, False))  # as the bias is left out
    for _ in range(2):
        results: dict[int, torch.Tensor] = {}
        stream.run([lambda x=x: stream.model(x, borrow) for x in (X, 2 * X)], results.__setitem__)  # type: ignore[misc]
        assert all(torch.equal(results[index], y) for index, y in enumerate(expected))
    once = checkpoint_bytes(tmp_path) - (reference.blocks[1].bias.nbytes if borrow else 0)  # type: ignore[union-attr, index, operator]
    assert stream.weights.tensors.bytes_read == 2 * once
    assert all(isinstance(parameter, Placeholder) for parameter in stream.model.parameters())
    with pytest.raises(UnsupportedError, match=r"a weight of shape \[8, 8\] that is not loaded"):
        F.linear(X, stream.model.blocks[1].weight)  # type: ignore[union-attr, index, arg-type]
    stream.close()
    assert not any(isinstance(parameter, Placeholder) for parameter in stream.model.parameters())


class Follows(nn.Module):
    """Moves its input to where its parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x.to(next(self.parameters()).device))
        return x


def test_a_model_that_moves_its_inputs_to_its_parameters_keeps_them(tmp_path: Path) -> None:
    reference, stream = stream_module(Follows, tmp_path)
    results: list[torch.Tensor] = []
    stream.run([lambda: stream.model(X)], lambda index, result: results.append(result))
    assert torch.equal(results[0], reference(X))
    assert {parameter.is_meta for parameter in stream.model.parameters()} == {True}
    assert {parameter.device.type for parameter in stream.model.parameters()} == {"cpu"}


def test_tied_parameters_stay_one_and_those_that_are_loaded_stay_themselves() -> None:
    tied, loaded = nn.Linear(8, 8, device="meta"), nn.Linear(8, 8)
    other = nn.Linear(8, 8, device="meta")
    other.weight, before = tied.weight, tied.weight
    modules = {"tied": tied, "other": other, "loaded": loaded}
    placeholders = Placeholders([(module, "weight", False, f"{name}.weight") for name, module in modules.items()])
    assert isinstance(tied.weight, Placeholder)
    assert tied.weight is other.weight
    assert not isinstance(loaded.weight, Placeholder)
    placeholders.remove()
    assert tied.weight is other.weight is before
