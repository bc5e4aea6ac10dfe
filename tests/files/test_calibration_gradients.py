"""Calibrations with gradients of a loss: version 2, which only they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from emloc_tools.errors import FormatError
from emloc_tools.files.calibration import Calibration, GramEntry, GramSpool, write_calibration
from emloc_tools.files.packing import unpack_lower
from emloc_tools.files.tensors import content_hash
from emloc_tools.records import GradientGram, Gram, Loss
from tests.files.making import calibration_fields, gram, save_calibration

LAYER = ("block.0.down",)


def of_gradients(g: torch.Tensor) -> GradientGram:
    """The second moments of the rows of `g (tokens, out)`."""
    return GradientGram(g.T @ g, "output", len(g), float((g**2).sum()))


def integers(tokens: int, features: int, seed: int) -> torch.Tensor:
    """Rows whose Gram is exact in float32."""
    return torch.randint(-4, 5, (tokens, features), generator=torch.Generator().manual_seed(seed)).float()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("loss", ["next-token", "model"])
@pytest.mark.parametrize(("max_shard_size", "shards"), [(1 << 40, 1), (1, 4)])
def test_gradients_are_read_back_beside_the_data_of_their_layers(
    tmp_path: Path, loss: Loss, max_shard_size: int, shards: int
) -> None:
    save_calibration(tmp_path / "c", gradients=True, loss=loss, max_shard_size=max_shard_size)
    calibration = Calibration(tmp_path / "c")
    assert (calibration.loss, len(calibration.manifest.shards)) == (loss, shards)
    assert calibration.gradient_layers == {"block.1.up", "block.0.down"}
    assert calibration.gradient("block.0.up") is None
    for layer, (side, tokens, energy) in {
        "block.1.up": ("input", 8, 2.5),
        "block.0.down": ("output", 7, 0.1),
    }.items():
        found = calibration.gradient(layer)
        assert found is not None
        assert (found.side, found.tokens, found.energy) == (side, tokens, energy)
        assert torch.equal(found.matrix, gram(4, seed=tokens))
    for layer, tokens in (("block.0.up", 10), ("block.1.up", 10), ("block.0.down", 9)):
        assert calibration.gram(layer).tokens == tokens
        assert torch.equal(calibration.gram(layer).matrix, gram(4, seed=tokens))
    calibration.close()


def test_data_alone_give_version_1_byte_for_byte_and_say_nothing_of_a_loss(tmp_path: Path) -> None:
    save_calibration(tmp_path / "plain")
    save_calibration(tmp_path / "loss", loss="model")
    save_calibration(tmp_path / "gradients", gradients=True, loss="model")
    assert contents(tmp_path / "plain") == contents(tmp_path / "loss")
    plain, with_gradients = (
        json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("plain", "gradients")
    )
    assert (plain["format_version"], with_gradients["format_version"]) == (1, 2)
    assert set(with_gradients) - set(plain) == {"loss"}
    assert all("energy" not in record for record in plain["grams"])
    calibration = Calibration(tmp_path / "plain")
    assert (calibration.loss, calibration.gradient_layers) == (None, frozenset())
    assert all(calibration.gradient(layer) is None for layer in calibration.manifest.layers)
    calibration.close()


def test_gradients_of_an_unnamed_loss_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="loss"):
        save_calibration(tmp_path / "c", gradients=True)
    assert not (tmp_path / "c" / "calibration.json").exists()


def test_the_library_finds_gradients_under_names_of_their_own(tmp_path: Path) -> None:
    save_calibration(tmp_path / "c", gradients=True, loss="model")
    stored = load_file(next((tmp_path / "c").glob("*.safetensors")))
    lower = np.tril_indices(4)
    assert {name: value.tolist() for name, value in stored.items()} == {
        "block.0.up.input_gram": gram(4, seed=10).numpy()[lower].tolist(),
        "block.0.down.output_gram": gram(4, seed=9).numpy()[lower].tolist(),
        "block.1.up.input_gradient_gram": gram(4, seed=8).numpy()[lower].tolist(),
        "block.0.down.output_gradient_gram": gram(4, seed=7).numpy()[lower].tolist(),
    }


def test_a_spool_sums_parts_of_gradients_apart_from_the_data_of_the_same_layer(tmp_path: Path) -> None:
    first, second, X = integers(5, 3, 1), integers(7, 3, 2), integers(6, 3, 3)
    spool = GramSpool(tmp_path / "spool")
    spool.add(LAYER, of_gradients(first))
    spool.add(LAYER, Gram(X.T @ X, "output", 6))
    spool.add(LAYER, of_gradients(second))
    g = torch.cat([first, second]).double()
    assert torch.equal(unpack_lower(spool.read(LAYER, "gradient"), 3).double(), g.T @ g)
    assert torch.equal(unpack_lower(spool.read(LAYER), 3), X.T @ X)
    assert spool.entries == {LAYER: GramEntry(LAYER, "output", 3, 6)}
    assert spool.gradients == {LAYER: GramEntry(LAYER, "output", 3, 12, "gradient", float((g**2).sum()))}
    spool.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_spool_gathered_is_written_and_read_back(tmp_path: Path) -> None:
    g, X = integers(5, 4, 1), integers(6, 4, 2)
    spool = GramSpool(tmp_path / "spool")
    spool.add(LAYER, Gram(X.T @ X, "output", 6))
    spool.add(LAYER, of_gradients(g))
    (tmp_path / "c").mkdir()
    write_calibration(
        tmp_path / "c",
        [*spool.gradients.values(), *spool.entries.values()],
        lambda entry: spool.read(entry.layers, entry.kind),
        max_shard_size=1 << 40,
        fields=calibration_fields(list(LAYER)) | {"loss": "next-token"},
    )
    calibration = Calibration(tmp_path / "c")
    found = calibration.gradient(*LAYER)
    assert found is not None
    assert torch.equal(found.matrix, g.T @ g)
    assert found.energy == float(found.matrix.trace())
    assert torch.equal(calibration.gram(*LAYER).matrix, X.T @ X)
    calibration.close()


@pytest.mark.parametrize(
    ("layers", "kind", "energy"),
    [(("a",), "gradient", None), (("a",), "data", 1.0), (("a", "b"), "gradient", 1.0), ((), "gradient", 1.0)],
)
def test_an_entry_has_an_energy_and_one_layer_if_it_is_a_gradient(
    layers: tuple[str, ...], kind: str, energy: float | None
) -> None:
    GramEntry(("a",), "input", 3, 1, "gradient", 0.0)
    GramEntry(("a", "b"), "input", 3, 1)
    with pytest.raises(ValueError, match="one layer and an energy"):
        GramEntry(layers, "input", 3, 1, kind, energy)  # type: ignore[arg-type]


@pytest.mark.parametrize("energy", [-1.0, float("inf"), float("nan")])
def test_an_energy_that_is_no_sum_of_squares_is_neither_written_nor_read(tmp_path: Path, energy: float) -> None:
    entry = GramEntry(LAYER, "output", 4, 1, "gradient", energy)
    data = GramEntry(LAYER, "output", 4, 1)
    (tmp_path / "c").mkdir()
    with pytest.raises(ValidationError, match="energy"):
        write_calibration(
            tmp_path / "c",
            [entry, data],
            lambda entry: torch.zeros(10),
            max_shard_size=1 << 40,
            fields=calibration_fields(list(LAYER)) | {"loss": "model"},
        )
    save_calibration(tmp_path / "read", gradients=True, loss="model")
    path = tmp_path / "read" / "calibration.json"
    # JSON has no word for infinity, but a number too large for float64 becomes it.
    number = {"inf": "1e999", "nan": "NaN"}.get(str(energy), str(energy))
    text = path.read_text()
    assert text.count('"energy": 2.5') == 1
    path.write_text(text.replace('"energy": 2.5', f'"energy": {number}'))
    with pytest.raises(FormatError) as caught:
        Calibration(tmp_path / "read")
    assert caught.value.rule == ("C1" if number == "NaN" else "C3")


@pytest.mark.parametrize(("value", "rule"), [(float("nan"), "C9"), (-1.0, "C9"), (2.0, "C8")])
def test_damaged_values_of_a_gradient_are_refused_as_those_of_data_are(tmp_path: Path, value: float, rule: str) -> None:
    save_calibration(tmp_path / "c", gradients=True, loss="model")
    path, manifest = next((tmp_path / "c").glob("*.safetensors")), tmp_path / "c" / "calibration.json"
    tensors, name = load_file(path), "block.0.down.output_gradient_gram"
    before = content_hash(tensors[name])
    tensors[name][:1] = value
    save_file(tensors, path)
    if rule == "C9":
        manifest.write_text(manifest.read_text().replace(before, content_hash(tensors[name])))
    calibration = Calibration(tmp_path / "c")
    with pytest.raises(FormatError) as caught:
        calibration.gradient("block.0.down")
    assert (caught.value.rule, caught.value.field) == (rule, name)
    calibration.gram("block.0.down")  # the data of the same layer are unharmed
    calibration.close()
