"""--ratio, --params and --size: what is stored keeps to the budget, and comes as near to it as ranks allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emloc_tools.errors import InputError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.truncate import truncate
from tests.stages.conftest import Case
from tests.stages.reference import read_json, read_tensors


def stored(folder: Path, unit: str) -> int:
    """Values or bytes of all tensors of a folder."""
    tensors = read_tensors(folder).values()
    return sum(tensor.numel() if unit == "params" else tensor.nbytes for tensor in tensors)


def one_more_rank_everywhere(folder: Path) -> int:
    """Values that the next rank of every layer would cost."""
    layers = read_json(folder / "emulator.json")["layers"].values()
    return sum(layer["out_features"] + layer["in_features"] + 1 for layer in layers)


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
@pytest.mark.parametrize("part", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("unit", ["params", "size"])
def test_everything_stored_keeps_to_the_budget(
    llama: Case, tmp_path: Path, unit: str, part: float, allocation: Any
) -> None:
    budget = int(part * stored(llama.base, unit))
    output = tmp_path / "emulator"
    options: dict[str, Any] = {unit: budget}
    build_emulator(base=str(llama.base), calibration=llama.calibration, allocation=allocation, output=output, **options)
    width = 1 if unit == "params" else 4
    assert budget - width * one_more_rank_everywhere(output) < stored(output, unit) <= budget


@pytest.mark.parametrize("part", [0.6, 0.8, 0.99])
def test_weights_that_stay_dense_count_in_their_own_wider_dtype(llama: Case, tmp_path: Path, part: float) -> None:
    budget = int(part * stored(llama.base, "size"))  # of float32; even full ranks of bfloat16 are less than 0.8 of it
    build_emulator(base=str(llama.base), size=budget, dtype="bfloat16", output=tmp_path / "emulator")
    assert stored(tmp_path / "emulator", "size") <= budget


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
def test_a_ratio_is_the_part_of_each_weight_that_its_factors_hold(llama: Case, tmp_path: Path, ratio: float) -> None:
    build_emulator(base=str(llama.base), ratio=ratio, output=tmp_path / "emulator")
    for layer in read_json(tmp_path / "emulator" / "emulator.json")["layers"].values():
        out, into = layer["out_features"], layer["in_features"]
        assert layer["rank"] == max(1, int(ratio * out * into / (out + into)))


def test_adaptive_ranks_cost_no_more_and_leave_less_error_than_uniform_ones(llama: Case, tmp_path: Path) -> None:
    lost, values = {}, {}
    for allocation in ("uniform", "adaptive"):
        output = tmp_path / allocation
        build_emulator(
            base=str(llama.base), calibration=llama.calibration, ratio=0.3, allocation=allocation, output=output
        )
        layers = read_json(output / "emulator.json")["layers"].values()
        lost[allocation] = sum(layer["relative_error"] ** 2 for layer in layers)
        values[allocation] = stored(output, "params")
    assert values["adaptive"] <= values["uniform"]
    assert lost["adaptive"] < lost["uniform"]


@pytest.mark.parametrize("unit", ["params", "size"])
def test_truncate_keeps_to_a_budget_too(llama: Case, tmp_path: Path, unit: str) -> None:
    build_emulator(base=str(llama.base), ratio=0.7, output=tmp_path / "large")
    budget = int(0.8 * stored(tmp_path / "large", unit))
    options: dict[str, Any] = {unit: budget}
    truncate(emulator=tmp_path / "large", output=tmp_path / "small", **options)
    width = 1 if unit == "params" else 4
    assert budget - width * one_more_rank_everywhere(tmp_path / "small") < stored(tmp_path / "small", unit) <= budget


def test_truncate_keeps_to_a_budget_where_full_ranks_cost_more_than_the_weights(llama: Case, tmp_path: Path) -> None:
    full = {name: min(seen.inputs.shape[0], seen.outputs.shape[0]) for name, seen in llama.moments.items()}
    build_emulator(base=str(llama.base), ranks=full, output=tmp_path / "full")
    budget = stored(llama.base, "params") - 1
    assert stored(tmp_path / "full", "params") > budget
    truncate(emulator=tmp_path / "full", params=budget, output=tmp_path / "small")
    assert stored(tmp_path / "small", "params") <= budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --ratio, --params and --size"),
        ({"ratio": 0.5, "size": 10**9}, "exactly one of --ratio, --params and --size"),
        ({"ratio": 0.0}, "--ratio 0 is outside 0 to 1"),
        ({"ratio": 1.0}, "--ratio 1 is outside 0 to 1"),
        ({"ratio": float("nan")}, "--ratio nan is outside 0 to 1"),
        ({"params": 10}, r"--params 10 is too small: rank 1 everywhere and what stays dense need [\d,]+"),
        ({"size": 10**12}, r"--size 1,000,000,000,000 is not below the base itself"),
    ],
)
def test_impossible_budgets_are_refused(llama: Case, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_emulator(base=str(llama.base), output=tmp_path / "emulator", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_budget_that_the_message_names_can_be_kept(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        build_emulator(base=str(llama.base), params=10, output=tmp_path / "emulator")
    least = int(str(refusal.value).split("need ")[1].split(";")[0].replace(",", ""))
    build_emulator(base=str(llama.base), params=least, output=tmp_path / "emulator")
    assert stored(tmp_path / "emulator", "params") == least
    with pytest.raises(InputError, match="too small"):
        build_emulator(base=str(llama.base), params=least - 1, output=tmp_path / "smaller")
