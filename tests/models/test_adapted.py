"""The module that an adapter means is found by its name or a prefix of it, and a pair of another shape is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from emloc_tools.errors import MismatchError
from emloc_tools.models.adapted import AdaptedModules, require_pair_shape


def tower(depth: int = 2) -> nn.Module:
    """Blocks of a linear layer and a normalisation, and an activation, which has no weight."""
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(3, 5), "norm": nn.LayerNorm(5), "act": nn.ReLU()}) for _ in range(depth)
    )
    return model


@pytest.fixture
def modules() -> AdaptedModules:
    model = nn.Module()
    model.text, model.image = tower(), tower(1)
    return AdaptedModules(model, Path("lora"), "org/base")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("text.layers.1.up", "text.layers.1.up"),
        ("layers.1.up", "text.layers.1.up"),  # a class without the part in front
        ("model.text.layers.0.norm", "text.layers.0.norm"),  # a class with one more
        ("layers.0.up", None),  # of text or image
        ("xt.layers.1.up", None),
        ("text.layers.1.act", None),
        ("text.layers.2.up", None),
        ("text", None),
    ],
)
def test_a_module_is_found_by_its_name_or_by_one_that_differs_in_front(
    modules: AdaptedModules, module: str, name: str | None
) -> None:
    assert modules.get(module) == name
    if name is not None:
        assert modules.find(module) == name
        assert isinstance(modules.modules[name], (nn.Linear, nn.LayerNorm))
        return
    message = f"the adapter in lora adapts {module}, which org/base does not have; it was trained on another model"
    with pytest.raises(MismatchError) as caught:
        modules.find(module)
    assert str(caught.value) == message


def test_a_pair_of_another_shape_is_refused_with_both() -> None:
    require_pair_shape("a.up", (5, 3), (5, 3), "the layer of org/base")
    with pytest.raises(MismatchError) as caught:
        require_pair_shape("a.up", (3, 5), (5, 3), "the layer of org/base")
    assert str(caught.value) == (
        "the LoRA pair of a.up is for 3 x 5, the layer of org/base is 5 x 3; the adapter was trained on another model"
    )
