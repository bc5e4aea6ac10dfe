"""merge-calibration of calibrations that hold gradients of the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emloc_tools.errors import UnsupportedError
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.merge_calibration import merge_calibration
from tests import pico
from tests.stages.conftest import Case
from tests.stages.gradients import with_gradients
from tests.stages.reference import close_to, read_json, read_tensors

LAYER, OTHER = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three calibrations of different data, without gradients."""
    root = tmp_path_factory.mktemp("plain")
    for seed in range(3):
        data = pico.save_texts(root / f"{seed}.jsonl", count=2, seed=seed)
        calibrate(base=str(llama.base), data=data, output=root / str(seed), targets="mlp", device="cpu")
    return [root / str(seed) for seed in range(3)]


def test_gradients_add_up_per_layer(plain: list[Path], tmp_path: Path) -> None:
    first, second, alone = torch.randn(7, 48), torch.randn(5, 48), torch.randn(4, 48)
    parts = [
        with_gradients(plain[0], tmp_path / "a", {LAYER: first}),
        with_gradients(plain[1], tmp_path / "b", {LAYER: second, OTHER: alone}),
        plain[2],  # has no gradients, and takes none away
    ]
    merge_calibration(parts=parts, output=tmp_path / "merged")
    manifest, tensors = read_json(tmp_path / "merged" / "calibration.json"), read_tensors(tmp_path / "merged")
    assert (manifest["format_version"], manifest["loss"]) == (2, "next-token")
    records = {record["layers"][0]: record for record in manifest["grams"] if record["side"] == "output_gradient"}
    assert records.keys() == {LAYER, OTHER}
    for layer, parts_of_it in ((LAYER, [first, second]), (OTHER, [alone])):
        g = torch.cat(parts_of_it).double()
        assert records[layer]["tokens"] == len(g)
        assert records[layer]["energy"] == pytest.approx(float((g**2).sum()))
        packed = (g.T @ g)[tuple(torch.tril_indices(48, 48))]
        assert close_to(tensors[records[layer]["tensor"]], packed) < 1e-6


def test_without_gradients_the_data_merge_as_before(plain: list[Path], tmp_path: Path) -> None:
    parts = [with_gradients(plain[0], tmp_path / "a", {LAYER: torch.randn(7, 48)}), plain[1]]
    merge_calibration(parts=parts, output=tmp_path / "with")
    merge_calibration(parts=plain[:2], output=tmp_path / "without")
    with_, without = read_tensors(tmp_path / "with"), read_tensors(tmp_path / "without")
    assert all(torch.equal(with_[name], tensor) for name, tensor in without.items())
    assert read_json(tmp_path / "without" / "calibration.json")["format_version"] == 1


def test_gradients_of_different_losses_are_refused(plain: list[Path], tmp_path: Path) -> None:
    parts = [
        with_gradients(plain[number], tmp_path / loss, {LAYER: torch.randn(7, 48)}, loss=loss)
        for number, loss in enumerate(["next-token", "model"])
    ]
    with pytest.raises(UnsupportedError, match=r"gradients of the loss 'next-token' and .* of 'model'"):
        merge_calibration(parts=parts, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_gradients_of_different_sides_are_refused(plain: list[Path], tmp_path: Path) -> None:
    parts = [
        with_gradients(plain[0], tmp_path / "a", {LAYER: torch.randn(7, 48)}),
        with_gradients(plain[1], tmp_path / "b", {LAYER: torch.randn(7, 32)}, side="input"),
    ]
    with pytest.raises(UnsupportedError, match=r"up_proj has input-side gradients in one calibration"):
        merge_calibration(parts=parts, output=tmp_path / "merged")
