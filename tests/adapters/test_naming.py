"""Whatever wrappers are put around a model before it is saved, the keys become PEFT's again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emloc_tools.adapters.naming import Naming
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.adapter_keys import parse_key
from emloc_tools.models.adapter_names import NamesInModel
from emloc_tools.models.skeleton import parameters_on_meta
from tests import pico
from tests.adapters.subjects import PREFIX


def skeleton(family: str) -> nn.Module:
    with parameters_on_meta():
        model: nn.Module = getattr(transformers, pico.CLASSES[family])(pico.config(family))
    return model


MODELS = {family: skeleton(family) for family in ("llama", "gpt2", "bert")}
LINEARS = [
    (family, name)
    for family, model in MODELS.items()
    for name, module in model.named_modules()
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
]


def inside(part: str) -> Callable[[list[str], int], list[str]]:
    """Put a wrapper somewhere into the path of a key, as one around a module in the model does."""
    return lambda parts, place: [*parts[: 2 + place % (len(parts) - 4)], part, *parts[2 + place % (len(parts) - 4) :]]


WRAPPED: list[Callable[[list[str], int], list[str]]] = [
    *(inside(part) for part in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")),
    lambda parts, _: ["module", *parts],
    lambda parts, _: ["base_model", "model", *parts],
    lambda parts, _: ["_orig_mod", *parts],
    lambda parts, _: [*parts[:-1], "task", parts[-1]],
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(LINEARS), st.lists(st.tuples(st.sampled_from(WRAPPED[:-1]), st.integers(0, 20)), max_size=4))
def test_any_wrappers_come_off(linear: tuple[str, str], wrappers: list[tuple[Callable[..., list[str]], int]]) -> None:
    family, module = linear
    parts = f"{PREFIX}{module}.lora_A.weight".split(".")
    for wrap, place in wrappers:
        parts = wrap(parts, place)
    for stored in (".".join(parts), ".".join(WRAPPED[-1](parts, 0))):
        key = parse_key(stored)
        assert NamesInModel(MODELS[family]).meant(key) == [module]
        assert key.part == "lora_A.weight"


@pytest.mark.parametrize("family", MODELS)
def test_names_that_peft_writes_stay(family: str, tmp_path: Path) -> None:
    naming = Naming(MODELS[family], None)
    adapter = object.__new__(Adapter)
    names = [f"{PREFIX}{name}.lora_{side}.weight" for which, name in LINEARS for side in "AB" if which == family]
    assert naming(adapter, names) == {name: name for name in names}
    assert naming.unclear == {}


@pytest.mark.parametrize(
    ("family", "path", "meant"),
    [
        ("gpt2", "h.0.attn.c_attn", ["transformer.h.0.attn.c_attn"]),
        ("gpt2", "transformer.h.0.attn.c_attn", ["transformer.h.0.attn.c_attn"]),  # its own name, not a pipeline's part
        ("llama", "language_model.model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("llama", "embed_tokens", ["model.embed_tokens"]),
        ("llama", "model.layers.9.mlp.up_proj", []),
        ("llama", "up_proj", [f"model.layers.{number}.mlp.up_proj" for number in range(3)]),
        ("llama", "p_proj", []),  # a whole part of a name, or nothing
        ("llama", "other.model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
    ],
)
def test_which_modules_a_name_may_mean(family: str, path: str, meant: list[str]) -> None:
    names = NamesInModel(MODELS[family])
    assert names.meant(parse_key(f"{path}.lora_A.weight")) == meant


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("model.blocks.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("model.layers.2.mlp.down_projection", "model.layers.2.mlp.down_proj"),
    ],
)
def test_a_name_that_means_nothing_is_shown_beside_the_most_similar(path: str, nearest: str) -> None:
    assert NamesInModel(MODELS["llama"]).nearest(path) == nearest
