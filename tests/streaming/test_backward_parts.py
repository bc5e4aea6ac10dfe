"""The parts of the streamed backward by themselves: tensors on disk, and telling whether two results are one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from emloc_tools.streaming.repeat import agree, carries_gradient, sketch, state_of
from emloc_tools.streaming.spill import Spill


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6, 10)
    return {
        **{
            str(dtype): (10 * base).to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.complex64)
        },
        "bool": base > 0,
        "scalar": torch.tensor(3.5),
        "one value": torch.ones(1, 1).expand(1, 1),
        "empty": base[:0],
        "transposed": base.transpose(0, 2),
        "sliced": base[1:3, ::2, 4:],
        "sliced and transposed": base.permute(2, 0, 1)[::3],
        "expanded": base[0, 0].expand(3, 5, 10),
        "expanded in the middle": base[:, :1].expand(4, 7, 10).transpose(0, 1),
        "needs a gradient": base.clone().requires_grad_(),
    }


@pytest.mark.parametrize("name", list(tensors()))
def test_a_tensor_comes_back_from_disk_as_it_was(name: str, tmp_path: Path) -> None:
    tensor = tensors()[name]
    with Spill(tmp_path) as spill:
        spill.save(torch.randn(3))
        stored = spill.save(tensor)
        spill.save(torch.randn(3))
        found = spill.load(stored)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert not found.requires_grad
        places = [place for place, size in enumerate(tensor.shape) if size > 1]
        order = sorted(places, key=lambda place: -tensor.stride(place))
        assert order == sorted(places, key=lambda place: -found.stride(place)), "the order in memory is another one"
        if found.numel():
            assert found.data_ptr() != tensor.data_ptr()


def test_expanded_dimensions_and_known_tensors_take_no_space(tmp_path: Path) -> None:
    row = torch.randn(100)
    with Spill(tmp_path) as spill:
        stored = spill.save(row.expand(50, 100))
        assert spill.written == row.nbytes
        assert spill.save(row.expand(50, 100)) is stored
        spill.save(row)  # another shape
        assert spill.written == 2 * row.nbytes
        first = spill.save(row)
        row.add_(1)
        second = spill.save(row)
        assert spill.written == 3 * row.nbytes
        assert torch.equal(spill.load(second), spill.load(first) + 1)


def test_memory_that_is_to_be_forgotten_is_written_again(tmp_path: Path) -> None:
    x = torch.zeros(100)
    with Spill(tmp_path) as spill:
        before = spill.save(x)
        alias = x.data  # the same memory with a version of its own
        alias.add_(1)
        assert x._version == 0
        assert spill.save(x) is before, "the control: the version says that nothing changed"
        spill.forget(alias)
        assert torch.equal(spill.load(spill.save(x)), torch.ones(100))


def test_memory_that_was_given_to_another_tensor_is_not_taken_for_the_first(tmp_path: Path) -> None:
    with Spill(tmp_path) as spill:
        stored = []
        for value in range(5000):
            stored.append(spill.save(torch.full((100,), float(value))))  # freed at once, so addresses repeat
        assert spill.written == 5000 * 400
        assert all(float(spill.load(each)[0]) == value for value, each in enumerate(stored))


def test_truncation_forgets_the_end_and_keeps_the_beginning(tmp_path: Path) -> None:
    first, second, third = torch.randn(3, 1000).unbind()
    with Spill(tmp_path) as spill:
        kept = spill.save(first)
        mark = spill.size
        spill.save(second)
        spill.truncate(mark)
        later = spill.save(third)
        assert later.offset == mark
        assert torch.equal(spill.load(spill.save(second)), second), "it is not known any more"
        assert torch.equal(spill.load(kept), first)
        assert torch.equal(spill.load(later), third)


SHAPES = [(200, 64), (2, 30, 8), (1, 5), (2, 1), (7,), ()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("constant", [False, True])
def test_sketches_agree_for_rounding_and_differ_for_more(
    constant: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    y = (torch.full(shape, 3.0) if constant else torch.randn(shape)).to(dtype)
    assert agree(sketch(y), sketch(y.clone()), dtype)
    eps = torch.finfo(dtype).eps
    rounded = (y.double() * (1 + eps * (torch.rand(shape) - 0.5))).to(dtype)
    assert agree(sketch(y), sketch(rounded), dtype)
    # Noise of ten times the tolerance, spread over all entries.
    noise = torch.randn(shape, dtype=torch.float64)
    noise *= 10 * eps**0.5 * y.double().norm() / noise.norm()
    assert not agree(sketch(y), sketch((y.double() + noise).to(dtype)), dtype)


def test_a_single_row_of_many_that_differs_shows_in_the_sketch() -> None:
    torch.manual_seed(0)
    y = torch.randn(1000, 64)
    missed = 0
    for row in range(0, 1000, 10):
        other = y.clone()
        other[row] = torch.randn(64)
        missed += agree(sketch(y), sketch(other), torch.float32)
    assert missed == 0
    # Sums, the obvious choice, would say the same of a row that was turned around.
    other = y.clone()
    other[5] = y[5].flip(0)
    assert torch.allclose(other.sum(), y.sum())
    assert not agree(sketch(y), sketch(other), torch.float32)


def test_infinities_and_nan_at_the_same_places_are_no_difference() -> None:
    y = torch.randn(20, 8)
    y[3] = -torch.inf
    assert agree(sketch(y), sketch(y.clone()), torch.float32)
    other = y.clone()
    other[3] = 0
    assert not agree(sketch(y), sketch(other), torch.float32)


def test_the_state_of_opaque_arguments_follows_nested_containers_and_tensors() -> None:
    tensor = torch.zeros(3)
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=tensor, length=0)], name="cache")
    before = state_of([cache, tensor])
    assert state_of([cache, tensor]) == before
    tensor.add_(1)
    assert state_of([cache]) != before
    before = state_of([cache])
    cache.layers[0].length = 1
    assert state_of([cache]) != before
    before = state_of([cache])
    cache.layers[0].keys = tensor.clone()
    assert state_of([cache]) != before
    assert not carries_gradient([cache])
    cache.layers[0].keys = tensor.clone().requires_grad_()
    assert carries_gradient([cache])
