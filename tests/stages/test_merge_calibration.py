"""merge-calibration: parts of the data add up to all of it, and what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from emloc_tools.errors import InputError, MismatchError, UnsupportedError
from emloc_tools.records import Step
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.merge_calibration import merge_calibration
from tests import pico
from tests.stages.conftest import MAX_LENGTH, Case
from tests.stages.reference import close_to, contents, read_grams, read_json, read_tensors

ROUNDING = 1e-6  # of sums in float32 in another order


@dataclass(frozen=True)
class Halves:
    """The calibrations of the two halves of a case's data."""

    first: Path
    second: Path


@pytest.fixture(scope="module")
def halves(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Halves:
    root = tmp_path_factory.mktemp("halves")
    lines = llama.data.read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:4]), ("second", lines[4:])):
        (root / f"{name}.jsonl").write_text("".join(part))
        calibrate(
            base=str(llama.base),
            data=root / f"{name}.jsonl",
            output=root / name,
            max_length=MAX_LENGTH,
            device="cpu",
        )
    return Halves(root / "first", root / "second")


def other_part(case: Case, root: Path, *, base: Path | None = None, targets: str | None = None) -> Path:
    """A calibration on other data."""
    data = pico.save_texts(root / "other.jsonl", count=2, seed=1)
    folder = root / "other"
    calibrate(base=str(base or case.base), data=data, output=folder, targets=targets, device="cpu")
    return folder


def test_halves_add_up_to_the_whole_and_one_half_does_not(llama: Case, halves: Halves, tmp_path: Path) -> None:
    steps: list[Step] = []
    result = merge_calibration(parts=[halves.first, halves.second], output=tmp_path / "merged", progress=steps.append)
    assert [(step.title, step.done) for step in steps] == [
        ("merge-calibration", number) for number in range(1, result.grams + 1)
    ]
    whole, merged, half = (read_grams(path) for path in (llama.calibration, tmp_path / "merged", halves.first))
    assert merged.keys() == whole.keys()
    for name, (side, tokens, G, tensor) in merged.items():
        assert (side, tokens, tensor) == (whole[name][0], whole[name][1], whole[name][3])
        assert close_to(G, whole[name][2]) < ROUNDING
        assert close_to(half[name][2], whole[name][2]) > 0.1
    assert (result.samples, result.tokens) == (llama.result.samples, llama.result.tokens)


def test_the_manifest_lists_the_data_of_every_part(halves: Halves, tmp_path: Path) -> None:
    merge_calibration(parts=[halves.first, halves.second], output=tmp_path / "merged", command="merge them")
    first, second, merged = (
        read_json(folder / "calibration.json") for folder in (halves.first, halves.second, tmp_path / "merged")
    )
    assert merged["data"] == first["data"] + second["data"]
    assert merged["layers"] == first["layers"]
    assert merged["base"] == first["base"]
    assert merged["made_by"]["command"] == "merge them"


def test_a_merged_calibration_can_be_merged_again(llama: Case, halves: Halves, tmp_path: Path) -> None:
    third = other_part(llama, tmp_path)
    merge_calibration(parts=[halves.first, halves.second], output=tmp_path / "two")
    merge_calibration(parts=[tmp_path / "two", third], output=tmp_path / "three")
    merge_calibration(parts=[halves.first, halves.second, third], output=tmp_path / "at once")
    one_by_one, at_once = read_tensors(tmp_path / "three"), read_tensors(tmp_path / "at once")
    assert one_by_one.keys() == at_once.keys()
    assert max(close_to(one_by_one[name], at_once[name]) for name in at_once) < ROUNDING


def test_a_layer_of_one_part_alone_keeps_its_gram(llama: Case, halves: Halves, tmp_path: Path) -> None:
    part = other_part(llama, tmp_path, targets=r"down_proj|o_proj")
    merge_calibration(parts=[halves.first, part], output=tmp_path / "merged")
    first, second, merged = (read_grams(path) for path in (halves.first, part, tmp_path / "merged"))
    for name, (_, tokens, G, _) in merged.items():
        added = second.get(name)
        assert tokens == first[name][1] + (added[1] if added else 0)
        assert close_to(G, first[name][2] + (added[2] if added else 0)) < ROUNDING
    assert 0 < len(second) < len(merged)


def test_layers_that_no_part_reached_are_listed(halves: Halves, tmp_path: Path) -> None:
    def without(source: Path, copy: Path, *unreached: str) -> Path:
        """A calibration that says so of layers that are not in it, as of a part of a model without data."""
        shutil.copytree(source, copy)
        manifest = read_json(copy / "calibration.json")
        (copy / "calibration.json").write_text(json.dumps({**manifest, "unreached": list(unreached)}))
        return copy

    parts = [without(halves.first, tmp_path / "a", "vision.0"), without(halves.second, tmp_path / "b", "vision.1")]
    merge_calibration(parts=parts, output=tmp_path / "merged")
    assert read_json(tmp_path / "merged" / "calibration.json")["unreached"] == ["vision.0", "vision.1"]


def test_other_weights_of_the_same_shapes_are_refused(llama: Case, halves: Halves, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", seed=1)
    part = other_part(llama, tmp_path, base=tmp_path / "base")
    with pytest.raises(MismatchError, match=r"another weight of model\.layers\.0.*same base"):
        merge_calibration(parts=[halves.first, part], output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_statistics_of_different_sides_are_refused(llama: Case, halves: Halves, tmp_path: Path) -> None:
    part = other_part(llama, tmp_path, targets="k_proj")  # alone its output is smaller; with q and v the input is
    assert {gram[0] for gram in read_grams(part).values()} == {"output"}
    with pytest.raises(UnsupportedError, match=r"k_proj has input-side .*--targets"):
        merge_calibration(parts=[halves.first, part], output=tmp_path / "merged")


def test_the_same_samples_twice_are_refused(llama: Case, halves: Halves, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"were both made from samples of first\.jsonl that --seed 0 chose"):
        merge_calibration(parts=[halves.first, halves.first], output=tmp_path / "merged")
    merge_calibration(parts=[halves.first, halves.second], output=tmp_path / "both")
    with pytest.raises(MismatchError, match=r"samples of second\.jsonl"):
        merge_calibration(parts=[halves.second, tmp_path / "both"], output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_one_part_is_not_enough(halves: Halves, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two"):
        merge_calibration(parts=[halves.first], output=tmp_path / "merged")


def test_an_output_in_the_place_of_a_part_is_refused(halves: Halves, tmp_path: Path) -> None:
    before = contents(halves.first)
    with pytest.raises(InputError, match="would replace the input"):
        merge_calibration(parts=[halves.first, halves.second], output=halves.first, overwrite=True)
    assert contents(halves.first) == before


def test_merging_gives_the_same_bytes_again(halves: Halves, tmp_path: Path) -> None:
    for name in ("a", "b"):
        merge_calibration(parts=[halves.first, halves.second], output=tmp_path / name, max_shard_size=4000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    manifest = read_json(tmp_path / "a" / "calibration.json")
    assert len(manifest["shards"]) > 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_merge_leaves_nothing(halves: Halves, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(step: object) -> None:
        raise error("stop")

    with pytest.raises(error):
        merge_calibration(parts=[halves.first, halves.second], output=tmp_path / "merged", progress=stop)
    assert list(tmp_path.iterdir()) == []
