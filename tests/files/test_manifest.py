"""Manifests are closed, strictly typed, and say that they are of a later version before anything else."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import xxhash

import emloc_tools
from emloc_tools.errors import FormatError
from emloc_tools.files.manifest import (
    CalibrationManifest,
    CalibrationV1,
    CalibrationV2,
    file_hash,
    made_by,
    manifest_dict,
)
from emloc_tools.files.manifest_reader import read_manifest
from tests.files.making import BASE, DATA, HASH, save_calibration

RULES = ("C1", "C2", "C3")


@pytest.fixture(params=[1, 2])
def manifest(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """One of each version: without gradients and with them."""
    gradients = request.param == 2
    save_calibration(tmp_path / "c", gradients=gradients, loss="next-token" if gradients else None)
    value = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert value["format_version"] == request.param
    return value


def read(folder: Path, value: Any) -> CalibrationManifest:
    path = folder / "calibration.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_manifest(path, (CalibrationV1, CalibrationV2), rules=RULES)[0]


def test_a_manifest_survives_reading_and_writing(tmp_path: Path, manifest: dict[str, Any]) -> None:
    assert manifest_dict(read(tmp_path, manifest)) == manifest
    assert list(manifest_dict(read(tmp_path, manifest))) == list(manifest)


@pytest.mark.parametrize("found", [0, 3, 10**30, -1, True, 1.0, 2.0, "1", None, [1], {"1": 1}])
def test_any_other_version_is_named_as_such(tmp_path: Path, manifest: dict[str, Any], found: object) -> None:
    manifest |= {"format_version": found, "a_field_of_later": 1}
    with pytest.raises(FormatError) as caught:
        read(tmp_path, manifest)
    assert (caught.value.rule, caught.value.field) == ("C2", "format_version")
    assert f"is {found!r}; this version of emloc-tools reads 1 and 2" in str(caught.value)
    later = found in (3, 10**30)
    assert ("update emloc-tools to read it" in str(caught.value)) == later


def test_version_2_is_told_by_its_field_and_version_1_has_none_of_its_fields(tmp_path: Path) -> None:
    save_calibration(tmp_path / "c", gradients=True, loss="model")
    two = json.loads((tmp_path / "c" / "calibration.json").read_text())
    with pytest.raises(FormatError, match=r"format_version: is 2, .* field `loss`, which is not there .*C2"):
        read(tmp_path, {key: value for key, value in two.items() if key != "loss"})
    data = [record for record in two["grams"] if "energy" not in record]
    for wrong, place in (
        (two | {"grams": data}, r"loss: Extra inputs"),
        ({key: value for key, value in two.items() if key != "loss"}, r"grams\.1\.side: Input should be"),
    ):
        with pytest.raises(FormatError, match=rf"{place}.*C3"):
            read(tmp_path, wrong | {"format_version": 1})
    one = {key: value for key, value in two.items() if key != "loss"} | {"grams": data, "format_version": 1}
    assert manifest_dict(read(tmp_path, one)) == one  # control: both changes together make it version 1


def test_a_missing_version_is_not_taken_for_the_first(tmp_path: Path, manifest: dict[str, Any]) -> None:
    del manifest["format_version"]
    with pytest.raises(FormatError, match=r"format_version: is None.*C2"):
        read(tmp_path, manifest)


@pytest.mark.parametrize("found", ["emloc-emulator", "", None, 1, ["emloc-calibration"], "x" * 10_000])
def test_another_format_is_named_in_a_short_line(tmp_path: Path, manifest: dict[str, Any], found: object) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, manifest | {"format": found})
    assert (caught.value.rule, caught.value.field) == ("C2", "format")
    assert len(str(caught.value)) < 500


def fields_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON object."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += fields_of(inner, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path."""
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return changed


def test_no_field_accepts_a_value_of_another_kind(tmp_path: Path, manifest: dict[str, Any]) -> None:
    """Every single field, with true, a fraction, a number, a text, a list and an object in its place."""
    tried = 0
    for path in fields_of(manifest):
        value = manifest
        for key in path:
            value = value[key]
        for wrong in (True, 1.5, -1, "text", ["text"], {"a": 1}, None):
            nullable = path[-1] == "max_length" or (path[-1] == "revision" and isinstance(wrong, (str, type(None))))
            if type(wrong) is type(value) or (nullable and not isinstance(wrong, (bool, float))):
                continue
            tried += 1
            with pytest.raises(FormatError) as caught:
                read(tmp_path, put(manifest, path, wrong))
            assert caught.value.rule in ("C2", "C3"), (path, wrong)
            assert str(path[0]) in caught.value.field
    assert tried > 6 * len(fields_of(manifest)) - 20


def test_no_object_accepts_a_field_more_or_less(tmp_path: Path, manifest: dict[str, Any]) -> None:
    grams = [("grams", index) for index in range(len(manifest["grams"]))]
    for path in [(), ("made_by",), ("base",), ("data", 0), ("layers", "block.0.up"), *grams]:
        place = manifest
        for key in path:
            place = place[key]
        for key in [key for key in place if key not in ("format", "format_version", "loss")]:
            changed = copy.deepcopy(manifest)
            inner = changed
            for step in path:
                inner = inner[step]
            del inner[key]
            with pytest.raises(FormatError, match=rf"{'.'.join(map(str, (*path, key)))}: Field required.*C3"):
                read(tmp_path, changed)
        with pytest.raises(FormatError, match=r"more: Extra inputs are not permitted.*C3"):
            read(tmp_path, put(manifest, (*path, "more"), 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("grams", 0, "tokens"), 0),
        (("grams", 0, "tokens"), 2**53),
        (("grams", 0, "features"), 10**400),
        (("grams", 0, "layers"), []),
        (("grams", 0, "side"), "outputs"),
        (("grams", 0, "hash"), HASH.upper()),
        (("grams", 0, "hash"), HASH[:-1]),
        (("grams", 0, "hash"), HASH + "\n"),
        (("grams",), []),
        (("shards",), []),
        (("shards", 0), "../calibration.safetensors"),
        (("shards", 0), "..safetensors"),
        (("shards", 0), "a\\b.safetensors"),
        (("shards", 0), "a.safetensors\n"),
        (("shards", 0), "a.bin"),
        (("data",), []),
        (("layers", "block.0.up", "orientation"), "Linear"),
        (("made_by", "libraries", "torch"), ""),
    ],
)
def test_values_out_of_range_are_refused(
    tmp_path: Path, manifest: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    read(tmp_path, manifest)  # as it was, it is accepted
    with pytest.raises(FormatError) as caught:
        read(tmp_path, put(manifest, path, value))
    assert caught.value.rule == "C3"
    assert caught.value.field.startswith(".".join(map(str, path)))


@pytest.mark.parametrize(
    ("path", "value"),
    [(("data", 0, "seed"), 2**100), (("data", 0, "seed"), -(2**100)), (("grams", 0, "tokens"), 2**53 - 1)],
)
def test_the_largest_allowed_values_are_accepted(
    tmp_path: Path, manifest: dict[str, Any], path: tuple[Any, ...], value: int
) -> None:
    changed = put(manifest, path, value)
    assert manifest_dict(read(tmp_path, changed)) == changed


def test_a_billion_layers_are_only_as_many_as_the_file_holds(tmp_path: Path, manifest: dict[str, Any]) -> None:
    layer = manifest["layers"]["block.0.up"]
    manifest["layers"] |= {f"layer.{index}": layer for index in range(20_000)}
    assert len(read(tmp_path, manifest).layers) == 20_003
    with pytest.raises(FormatError, match=r"layers: .*dictionary.*C3"):
        read(tmp_path, manifest | {"layers": 10**9})


def test_made_by_records_what_is_installed_and_no_time() -> None:
    record = made_by("emloc-tools calibrate")
    assert record.emloc_tools == emloc_tools.__version__
    assert record.libraries == {name: version(name) for name in ("torch", "transformers")}
    assert made_by("x") == made_by("x")


def test_records_cannot_be_changed_and_are_compared_by_value() -> None:
    with pytest.raises(ValueError, match="frozen"):
        BASE.id = "another"  # type: ignore[misc]
    assert DATA.model_copy() == DATA
    assert DATA.model_copy(update={"seed": 1}) != DATA


def test_a_file_s_hash_is_over_all_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # several blocks
    (tmp_path / "x").write_bytes(data)
    assert file_hash(tmp_path / "x") == f"xxh3_128:{xxhash.xxh3_128(data).hexdigest()}"
