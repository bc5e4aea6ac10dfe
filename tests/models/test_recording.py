"""What a module is called with becomes ready model inputs: all of it, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from emloc_tools import record_inputs
from emloc_tools.errors import EmlocError, InputError, UnsupportedError
from emloc_tools.stages.calibrate import calibrate
from tests import pico
from tests.stages.reference import read_grams


class Probe(nn.Module):
    """Takes arguments of many kinds."""

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor | float | None = None,
        causal: bool = False,
        extra: dict[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> torch.Tensor:
        return 2 * x


def numbered(*numbers: float) -> list[torch.Tensor]:
    return [torch.tensor([number]) for number in numbers]


def recorded(path: Path, argument: str = "x") -> list[float]:
    """An argument's first value in every call, in the order of their numbers."""
    tensors = load_file(path)
    numbers = sorted(int(name.split("/")[0]) for name in tensors if name.endswith(f"/{argument}"))
    return [float(tensors[f"{number}/{argument}"].flatten()[0]) for number in numbers]


def test_every_tensor_of_every_call_is_stored_as_it_was(tmp_path: Path) -> None:
    module, path = Probe(), tmp_path / "inputs.safetensors"
    x, t = torch.randn(2, 3, dtype=torch.float64).T, torch.tensor(7)  # neither contiguous nor of the usual dtype
    with record_inputs(module, path):
        result = module(x, t, return_dict=False, pixel_values=torch.ones(2, dtype=torch.bfloat16))
        module(x=x + 1, causal=False, extra={})
        x.zero_()  # what is stored is what the module saw
    stored = load_file(path)
    assert torch.equal(result, 2 * stored["0/x"])  # the module ran as ever
    assert torch.equal(stored["1/x"], stored["0/x"] + 1)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "0/x": (torch.float64, (3, 2)),
        "0/t": (torch.int64, ()),
        "0/pixel_values": (torch.bfloat16, (2,)),
        "1/x": (torch.float64, (3, 2)),
    }
    module(x)  # after the block nothing is recorded
    assert load_file(path).keys() == stored.keys()


@pytest.mark.parametrize("keep", [1, 3, 4])
def test_of_a_run_calls_are_kept_one_from_each_equal_stretch(tmp_path: Path, keep: int) -> None:
    module, path = Probe(), tmp_path / "inputs.safetensors"
    with record_inputs(module, path, per_run=keep, seed=5) as recorder:
        for run in range(20):
            with recorder.run():
                for x in numbered(*range(100 * run, 100 * run + 12)):
                    module(x)
    assert recorder.calls == 20 * keep
    found = torch.tensor(recorded(path)).reshape(20, keep)
    stretch = 12 // keep
    assert torch.equal((found % 100) // stretch, torch.arange(float(keep)).expand(20, keep))
    assert len({tuple(row) for row in (found % 100).tolist()}) > 1  # not always the same timesteps


def test_the_seed_decides_what_is_kept(tmp_path: Path) -> None:
    def kept(name: str, seed: int) -> list[float]:
        module = Probe()
        with record_inputs(module, tmp_path / f"{name}.safetensors", per_run=2, seed=seed) as recorder, recorder.run():
            for x in numbered(*range(50)):
                module(x)
        return recorded(tmp_path / f"{name}.safetensors")

    assert kept("first", 1) == kept("second", 1)
    assert kept("first-of-2", 2) != kept("second-of-1", 1)


def test_short_runs_and_calls_outside_of_runs_are_kept_whole(tmp_path: Path) -> None:
    module, path = Probe(), tmp_path / "inputs.safetensors"
    with record_inputs(module, path, per_run=3) as recorder:
        module(torch.tensor([1.0]))
        with recorder.run():
            for x in numbered(2.0, 3.0):
                module(x)
        for x in numbered(4.0, 5.0, 6.0, 7.0):
            module(x)
    assert recorded(path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_target_belongs_to_the_last_call(tmp_path: Path) -> None:
    module, path = Probe(), tmp_path / "inputs.safetensors"
    with record_inputs(module, path) as recorder:
        with pytest.raises(InputError, match="there was none yet"):
            recorder.target(torch.ones(1))
        for x in numbered(1.0, 2.0):
            module(x)
            recorder.target(10 * x)
        with pytest.raises(InputError, match="has a target already"):
            recorder.target(torch.ones(1))
    assert recorded(path, "target") == [10, 20]


def test_a_probe_is_the_output_and_noise_that_the_seed_decides(tmp_path: Path) -> None:
    module, x = Probe(), 3 * torch.randn(2, 500)
    found = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        path = tmp_path / f"{name}.safetensors"
        with record_inputs(module, path, probe=True, seed=seed):
            module(x)
            module(x.bfloat16())
        found.append([load_file(path)[f"{number}/target"] for number in range(2)])
    noise = found[0][0] - 2 * x
    assert abs(float(noise.square().mean()) - 1) < 4 * (2 / noise.numel()) ** 0.5  # four standard errors of a variance
    assert {target.dtype for target in found[0]} == {torch.float32}
    assert all(map(torch.equal, found[0], found[1]))
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.allclose(found[0][0], found[0][1], atol=0.1)  # every call has noise of its own


Call = Callable[[Probe], object]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m(torch.ones(1), causal=True), "causal=True"),
        (lambda m: m(torch.ones(1), t=0.5), "t=0.5"),
        (lambda m: m(torch.ones(1), extra={"scale": 0.5}), "extra={'scale': 0.5}"),
        (lambda m: m(torch.ones(1), extra={"embeds": torch.ones(1), "scale": 2}), "extra={'embeds': tensor"),
        (lambda m: m(torch.ones(1), extra={"a.b": torch.ones(1)}), "extra={'a.b': tensor"),
        (lambda m: m(torch.ones(1), extra={"inner": {"embeds": torch.ones(1)}}), "extra={'inner': "),
        (lambda m: m(torch.ones(1), others=[torch.ones(1)]), "others=[tensor"),
        (lambda m: m(torch.ones(1), mode="fast"), "mode='fast'"),
        (lambda m: m(torch.ones(1), causal=None), "causal=None"),
    ],
)
def test_what_changes_the_result_and_is_no_tensor_is_refused(tmp_path: Path, call: Call, named: str) -> None:
    """Calibration would run without it."""
    module, path = Probe(), tmp_path / "inputs.safetensors"
    with pytest.raises(UnsupportedError) as caught, record_inputs(module, path):
        call(module)
    assert f"Probe was called with {named}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    call(module)  # control: the module itself takes it, and the hook is gone


def test_an_argument_called_target_is_refused(tmp_path: Path) -> None:
    """Calibration would take it for what the output is to be."""
    message = "Probe has an argument target"
    module = Probe()
    with pytest.raises(UnsupportedError, match=message), record_inputs(module, tmp_path / "inputs.safetensors"):
        module(torch.ones(1), target=torch.ones(1))


@pytest.mark.parametrize("extra", [None, {}, {"scale": None}])
def test_what_changes_nothing_is_left_out(tmp_path: Path, extra: Any) -> None:
    module, path = Probe(), tmp_path / "inputs.safetensors"
    with record_inputs(module, path):
        module(torch.ones(1), None, False, extra, return_dict=False, cache=None)
    assert set(load_file(path)) == {"0/x"}


def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    module = Probe()
    with pytest.raises(TypeError), record_inputs(module, tmp_path / "inputs.safetensors"):
        module(torch.ones(1) + module(None))
    assert list(tmp_path.iterdir()) == []


def test_unusable_paths_and_blocks_without_a_call_are_refused(tmp_path: Path) -> None:
    module, path = Probe(), tmp_path / "inputs.safetensors"
    (tmp_path / "file").write_text("")
    cases: list[tuple[Path, str]] = [
        (path, "nothing was recorded .*: the module was not called"),
        (tmp_path / "inputs.bin", r"must be called \*.safetensors"),
        (tmp_path / "file" / "inputs.safetensors", "cannot write into"),
    ]
    for place, message in cases:
        with pytest.raises(EmlocError, match=message), record_inputs(module, place):
            pass
    with pytest.raises(InputError, match="at least one call"), record_inputs(module, path, per_run=0):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]


def test_a_file_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path: Path) -> None:
    module, path = Probe(), tmp_path / "inputs.safetensors"
    with record_inputs(module, path):
        module(torch.tensor([1.0]))
    with pytest.raises(InputError, match="already exists"), record_inputs(module, path):
        module(torch.tensor([2.0]))
    with pytest.raises(TypeError), record_inputs(module, path, overwrite=True):
        module(module(torch.tensor([2.0])) + "")
    assert recorded(path) == [1]
    with record_inputs(module, path, overwrite=True):
        module(torch.tensor([2.0]))
    assert recorded(path) == [2]


def test_a_dtype_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    module = Probe()
    message = "the argument x is of torch.complex64, which cannot be stored"
    with pytest.raises(InputError, match=message), record_inputs(module, tmp_path / "inputs.safetensors"):
        module(torch.ones(1, dtype=torch.complex64))


def test_calibrating_on_recorded_inputs_equals_calibrating_on_the_texts(tmp_path: Path) -> None:
    """A language model, recorded while it runs on the same token ids: the recorder is not for pipelines alone."""
    model = pico.save_model(tmp_path / "base")
    texts = pico.save_texts(tmp_path / "texts.jsonl", count=4)
    with record_inputs(model, tmp_path / "inputs.safetensors"), torch.no_grad():
        for ids in pico.token_ids(texts, tmp_path / "base", 32):
            model(torch.tensor([ids]))
    base = str(tmp_path / "base")
    calibrate(base=base, data=texts, max_length=32, output=tmp_path / "of-texts", device="cpu")
    calibrate(base=base, data=tmp_path / "inputs.safetensors", output=tmp_path / "of-inputs", device="cpu")
    expected, found = (read_grams(tmp_path / name) for name in ("of-texts", "of-inputs"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name][2], expected[name][2]) for name in expected)
