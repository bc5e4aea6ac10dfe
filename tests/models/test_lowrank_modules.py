"""Low-rank layers compute `U diag(S) Vh x + b`, and their dense weight can be read but not written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from emloc_tools.models.lowrank_layers import DerivedWeight, LowRankConv1D, LowRankLayer, LowRankLinear
from emloc_tools.models.lowrank_modules import factor_layers
from tests import pico

IN, OUT, RANK = 24, 16, 5


def filled(cls: type[LowRankLayer], *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A layer with random factors."""
    layer = cls(IN, OUT, RANK, bias=bias, dtype=dtype)  # type: ignore[call-arg]
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return layer


def product(layer: Any) -> torch.Tensor:
    """U diag(S) Vh `(out, in)` in float64."""
    return layer.U.double() @ torch.diag(layer.S.double()) @ layer.Vh.double()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative difference in the Frobenius norm."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


CLASSES = pytest.mark.parametrize("cls", [LowRankLinear, LowRankConv1D])
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)  # a few roundings of each dtype


@CLASSES
@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_linear_map_of_the_product(
    cls: type[LowRankLayer], dtype: torch.dtype, tolerance: float, bias: bool
) -> None:
    layer = filled(cls, bias=bias, dtype=dtype)
    x = torch.randn(3, 7, IN, dtype=dtype)
    expected = F.linear(x.double(), product(layer), layer.bias.double() if bias else None)
    y = layer(x)
    assert y.dtype == dtype
    assert relative(y, expected) < tolerance
    assert relative(y, F.linear(x.double(), product(layer) * 1.1)) > 0.05  # control


@CLASSES
@DTYPES
def test_the_gradient_of_the_inputs_is_that_of_the_product(
    cls: type[LowRankLayer], dtype: torch.dtype, tolerance: float
) -> None:
    layer = filled(cls, dtype=dtype)
    x, out = torch.randn(7, IN, dtype=dtype, requires_grad=True), torch.randn(7, OUT, dtype=dtype)
    layer(x).backward(out)
    assert x.grad is not None
    assert relative(x.grad, out.double() @ product(layer)) < tolerance
    assert all(getattr(layer, name).grad is None for name in ("U", "S", "Vh"))


@CLASSES
@DTYPES
def test_the_weight_is_the_product_in_the_orientation_of_the_replaced_module(
    cls: type[LowRankLayer], dtype: torch.dtype, tolerance: float
) -> None:
    layer = filled(cls, dtype=dtype)
    expected = product(layer).T if cls is LowRankConv1D else product(layer)
    original: Any = Conv1D(OUT, IN) if cls is LowRankConv1D else nn.Linear(IN, OUT)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (original.weight.shape, dtype, layer.U.device)
    assert relative(weight.clone(), expected) < tolerance
    assert relative(weight @ torch.eye(weight.shape[1], dtype=dtype), expected) < tolerance
    assert relative(weight.t() + 0, expected.T) < tolerance
    assert relative(torch.empty_like(weight.clone()).copy_(weight), expected) < tolerance
    assert relative(weight.norm(dim=1), expected.norm(dim=1)) < tolerance
    x = torch.randn(3, weight.shape[1], dtype=dtype, requires_grad=True)
    F.linear(x, weight).sum().backward()
    assert relative(x.grad, expected.sum(0).expand(3, -1)) < tolerance  # type: ignore[arg-type]


@CLASSES
def test_shape_dtype_and_device_cost_no_product(cls: type[LowRankLayer], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = filled(cls)

    def dense(self: LowRankLayer) -> torch.Tensor:
        raise AssertionError("the product was computed")

    monkeypatch.setattr(LowRankLayer, "_dense", dense)
    weight = layer.weight
    _ = weight.shape, weight.dtype, weight.device, weight.ndim, weight.numel(), repr(weight), weight.data.shape
    assert weight.detach().requires_grad is False
    with pytest.raises(AssertionError):  # control
        weight.clone()


WRITES: dict[str, Callable[[Any], object]] = {
    "layer.weight =": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(OUT, IN))),
    "register_parameter": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(OUT, IN))),
    "weight.data =": lambda layer: setattr(layer.weight, "data", torch.zeros_like(layer.weight.clone())),
    "weight.data +=": lambda layer: layer.weight.data.__iadd__(1),
    "weight.data.copy_": lambda layer: layer.weight.data.copy_(torch.zeros(())),
    "weight.data[0] =": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "weight[0, 0] =": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "add_": lambda layer: layer.weight.add_(1),
    "sub_": lambda layer: layer.weight.detach().sub_(1),
    "mul_ of a row": lambda layer: layer.weight[0].mul_(0),
    "zero_ of the transpose": lambda layer: layer.weight.T.zero_(),
    "zero_ of a flat view": lambda layer: layer.weight.view(-1).zero_(),
    "fill_ of a part of a split": lambda layer: layer.weight.chunk(2)[1].fill_(1),
    "out=": lambda layer: torch.add(torch.zeros(layer.weight.shape), 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 1),
    "init.normal_": lambda layer: nn.init.normal_(layer.weight),
    "init.kaiming_uniform_": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "init.orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    "set_": lambda layer: layer.weight.set_(torch.zeros(3)),
    "resize_": lambda layer: layer.weight.resize_(3),
}


@CLASSES
@pytest.mark.parametrize("write", list(WRITES))
def test_every_way_of_writing_the_weight_raises(cls: type[LowRankLayer], write: str) -> None:
    layer = filled(cls)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad(), pytest.raises((RuntimeError, KeyError)) as caught:
        WRITES[write](layer)
    if write not in ("register_parameter", "set_", "resize_"):  # these three torch refuses by itself
        assert "its dense weight is derived and cannot be written" in str(caught.value)
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@CLASSES
def test_state_dict_copies_and_conversions_are_those_of_the_factors(cls: type[LowRankLayer]) -> None:
    layer = filled(cls)
    assert list(layer.state_dict()) == ["U", "S", "Vh", "bias"]
    assert list(filled(cls, bias=False).state_dict()) == ["U", "S", "Vh"]
    assert list(layer.children()) == []
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]

    twin = copy.deepcopy(layer)
    twin.S.data *= 2
    assert relative(twin.weight.clone(), layer.weight.clone() * 2) < 1e-6

    for converted, dtype in (
        (copy.deepcopy(layer).half(), torch.float16),
        (copy.deepcopy(layer).to(torch.bfloat16), torch.bfloat16),
    ):
        assert {p.dtype for p in converted.parameters()} == {converted.weight.dtype} == {dtype}
        assert relative(converted.weight.clone(), layer.weight.clone()) < 0.02
    ghost = copy.deepcopy(layer).to("meta")
    assert ghost.weight.device.type == "meta"
    assert ghost(torch.empty(3, IN, device="meta")).shape == (3, OUT)


def factored(family: str = "llama", ranks: dict[str, int] | None = None) -> tuple[Any, dict[str, int]]:
    """A random model whose layers of the first block are replaced."""
    torch.manual_seed(0)
    model = getattr(transformers, pico.CLASSES[family])(pico.config(family))
    if ranks is None:
        kinds = (nn.Linear, Conv1D)
        ranks = {name: 3 for name, module in model.named_modules() if isinstance(module, kinds) and ".0." in name}
    return factor_layers(model, ranks), ranks


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_layers_are_replaced_under_their_names_and_look_like_what_they_replace(family: str) -> None:
    plain = getattr(transformers, pico.CLASSES[family])(pico.config(family))
    model, ranks = factored(family)
    assert model.training
    for name, module in plain.named_modules():
        twin = model.get_submodule(name)
        assert isinstance(twin, type(module))
        assert isinstance(twin, LowRankLayer) == (name in ranks)
        if name in ranks:
            assert twin.weight.shape == module.weight.shape
            assert (twin.bias is None) == (module.bias is None)
            for attribute in ("nf", "nx") if family == "gpt2" else ("in_features", "out_features"):
                assert getattr(twin, attribute) == getattr(module, attribute)


def test_initialising_a_factored_model_leaves_its_layers_alone() -> None:
    """GPT-2's initialisation writes the weight of every `c_proj`, which here would raise."""
    model, ranks = factored("gpt2")
    for name in ranks:
        for parameter in model.get_submodule(name).parameters():
            parameter.data.fill_(0.5)
    model.init_weights()
    for name in ranks:
        assert all(bool((parameter == 0.5).all()) for parameter in model.get_submodule(name).parameters()), name


def test_saving_and_loading_a_factored_model_needs_no_pickle(tmp_path: Path) -> None:
    model, ranks = factored()
    for name in ranks:
        for parameter in model.get_submodule(name).parameters():
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))

    class Factored(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            factor_layers(self, ranks)

    loaded, report = Factored.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_class_without_a_head_finds_its_layers_without_the_prefix_and_the_other_way_round() -> None:
    bare = factor_layers(transformers.LlamaModel(pico.config("llama")), {"model.layers.1.mlp.up_proj": 2})
    assert isinstance(bare.layers[1].mlp.up_proj, LowRankLinear)
    headed = factor_layers(transformers.LlamaForCausalLM(pico.config("llama")), {"layers.1.mlp.up_proj": 2})
    assert isinstance(headed.model.layers[1].mlp.up_proj, LowRankLinear)


def test_a_model_of_another_shape_is_refused_instead_of_loaded_in_part() -> None:
    model = transformers.LlamaForCausalLM(pico.config("llama"))
    with pytest.raises(ValueError, match=r"has no model\.layers\.7\.mlp\.up_proj"):
        factor_layers(model, {"model.layers.0.mlp.up_proj": 2, "model.layers.7.mlp.up_proj": 2})
    with pytest.raises(ValueError, match="none of this emulator's layers, such as head"):
        factor_layers(model, {"head": 2})
    with pytest.raises(TypeError, match=r"model\.norm is a LlamaRMSNorm"):
        factor_layers(model, {"model.norm": 2})


def test_the_guard_is_ignored_by_the_factored_class_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, ranks = factored()
    ignored = model._keys_to_ignore_on_load_unexpected
    assert {pattern.replace("\\", "") for pattern in ignored} >= {f"^{name}.weight$" for name in ranks}
    assert transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected in (None, [], set())


@pytest.mark.parametrize(
    ("declared", "kind"), [("set[str] | list[str] | None", set), ("list[str] | None", list), (None, list)]
)
def test_ignored_keys_are_of_the_kind_that_the_release_of_transformers_joins_with_its_own(
    monkeypatch: pytest.MonkeyPatch, declared: str | None, kind: type
) -> None:
    """The newest releases of transformers declare sets, 5.6 a list, and those of 4 nothing: they take lists."""
    declarations = {"_keys_to_ignore_on_load_unexpected": declared} if declared else {}
    monkeypatch.setattr(transformers.PreTrainedModel, "__annotations__", declarations)
    assert type(factored()[0]._keys_to_ignore_on_load_unexpected) is kind


def test_a_derived_weight_shows_itself_without_computing() -> None:
    assert repr(filled(LowRankLinear).weight) == "DerivedWeight(shape=(16, 24), dtype=torch.float32, device=cpu)"
    assert isinstance(filled(LowRankLinear).weight, DerivedWeight)
    assert "in_features=24, out_features=16, rank=5, bias=True" in repr(filled(LowRankLinear))
