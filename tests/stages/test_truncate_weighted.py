"""truncate and merge-calibration where gradients weight the error: as a direct build, and as the whole data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.merge_calibration import merge_calibration
from emloc_tools.stages.truncate import truncate
from tests import pico
from tests.stages.conftest import MAX_LENGTH, Case
from tests.stages.gradients import with_gradients
from tests.stages.loss_reference import read_gradients
from tests.stages.reference import close_to, read_json, read_tensors


def assert_a_cut_equals_a_build(base: Path, calibration: Path, folder: Path, **options: Any) -> Any:
    """The manifest of an emulator built at ratio 0.25, after a cut one was found to be the same up to rounding."""
    for name, ratio in (("large", 0.6), ("small", 0.25)):
        build_emulator(base=str(base), calibration=calibration, ratio=ratio, output=folder / name, **options)
    truncate(emulator=folder / "large", ratio=0.25, output=folder / "cut")
    expected, found = (read_json(folder / name / "emulator.json") for name in ("small", "cut"))
    built, cut = (read_tensors(folder / name) for name in ("small", "cut"))
    assert {name: tensor.shape for name, tensor in cut.items()} == {n: tensor.shape for n, tensor in built.items()}
    assert all(close_to(cut[name], built[name]) < 1e-6 for name in built if built[name].norm() > 0)
    for name, layer in expected["layers"].items():
        for field in ("relative_error", "total_energy"):
            assert found["layers"][name].pop(field) == pytest.approx(layer.pop(field), rel=1e-4)
    for field in ("format_version", "weighting", "allocation", "layers", "parameters", "calibration"):
        assert found[field] == expected[field]
    return expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_a_cut_emulator_equals_one_built_at_that_size(
    weighted_case_of: Callable[[str], Case], family: str, tmp_path: Path, allocation: Any
) -> None:
    case = weighted_case_of(family)
    manifest = assert_a_cut_equals_a_build(case.base, case.calibration, tmp_path, allocation=allocation)
    assert manifest["weighting"]["sensitivity"].keys() == manifest["layers"].keys()


def test_layers_without_gradients_keep_their_ratio_in_a_cut_emulator(llama: Case, tmp_path: Path) -> None:
    names = [f"model.layers.{block}.self_attn.{part}_proj" for block in range(3) for part in "qo"]
    gradients = {name: 3.0**number * torch.randn(60, 32) for number, name in enumerate(names)}
    folder = with_gradients(llama.calibration, tmp_path / "calibration", gradients)
    manifest = assert_a_cut_equals_a_build(llama.base, folder, tmp_path)
    assert manifest["weighting"]["sensitivity"].keys() == set(names)
    assert len({manifest["layers"][name]["rank"] for name in names}) > 1, "the others do share"


def test_calibrations_of_two_halves_give_the_gradients_and_the_emulator_of_the_whole(
    weighted: Case, tmp_path: Path
) -> None:
    lines = weighted.data.read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:5]), ("b", lines[5:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        calibrate(
            base=str(weighted.base),
            data=tmp_path / f"{name}.jsonl",
            output=tmp_path / name,
            gradients=True,
            max_length=MAX_LENGTH,
            device="cpu",
        )
    merged = merge_calibration(parts=[tmp_path / "a", tmp_path / "b"], output=tmp_path / "merged")
    assert (merged.grams, merged.gradients) == (weighted.result.grams, weighted.result.gradients)
    whole, found = read_gradients(weighted.calibration), read_gradients(tmp_path / "merged")
    assert found.keys() == whole.keys()
    for name, (side, tokens, energy, G) in found.items():
        assert (side, tokens) == whole[name][:2]
        assert energy == pytest.approx(whole[name][2], rel=1e-6)
        assert close_to(G, whole[name][3]) < 1e-6
        assert close_to(read_gradients(tmp_path / "a")[name][3], whole[name][3]) > 0.01, "the control"
    for name, calibration in (("of whole", weighted.calibration), ("of merged", tmp_path / "merged")):
        build_emulator(base=str(weighted.base), calibration=calibration, ratio=0.4, output=tmp_path / name)
    one, other = (read_json(tmp_path / name / "emulator.json")["layers"] for name in ("of whole", "of merged"))
    assert {name: layer["rank"] for name, layer in one.items()} == {
        name: layer["rank"] for name, layer in other.items()
    }
    for name, layer in one.items():
        assert other[name]["relative_error"] == pytest.approx(layer["relative_error"], rel=1e-4)


def test_the_energy_of_filled_directions_is_not_counted_when_they_are_cut(llama: Case, tmp_path: Path) -> None:
    """Six tokens have energy along six directions; the others have none, whatever the floor of S says."""
    data = pico.write_jsonl(tmp_path / "short.jsonl", [{"text": "abcdef"}])
    calibrate(base=str(llama.base), data=data, output=tmp_path / "calibration", device="cpu")
    name = "model.layers.1.mlp.down_proj"
    build_emulator(
        base=str(llama.base), calibration=tmp_path / "calibration", ratio=0.7, targets=name, output=tmp_path / "large"
    )
    truncate(emulator=tmp_path / "large", ratio=0.4, output=tmp_path / "cut")
    large, cut = (read_json(tmp_path / n / "emulator.json")["layers"][name] for n in ("large", "cut"))
    assert large["rank"] > cut["rank"] >= cut["energetic"] == large["energetic"] == 6
    assert cut["relative_error"] == large["relative_error"] < 1e-3
