"""The readers accept and refuse what the golden folders say."""

from __future__ import annotations

import pytest
import torch

from emloc_tools.errors import FormatError
from tests.formats.golden import BAD, EXPECTED, GOOD, golden, read_all


@pytest.mark.parametrize(("kind", "name"), GOOD)
def test_a_good_folder_is_read_completely(kind: str, name: str) -> None:
    values = read_all(kind, golden(kind, name))
    assert values
    assert all(torch.isfinite(tensor).all() for tensor in values.values())


@pytest.mark.parametrize(("kind", "name"), BAD)
def test_a_bad_folder_is_refused_for_its_rule_with_file_and_place(kind: str, name: str) -> None:
    folder, expected = golden(kind, name), EXPECTED[kind][name]
    with pytest.raises(FormatError) as caught:
        read_all(kind, folder)
    error = caught.value
    assert (error.rule, error.file, error.field) == (
        expected["rule"],
        str(folder / expected["file"]),
        expected["field"],
    )
    assert str(error).startswith(error.file)
    assert str(error).endswith(f"(format rule {error.rule})")
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(("kind", "name"), BAD)
def test_a_bad_folder_differs_from_a_good_one_in_few_files(kind: str, name: str) -> None:
    folder = golden(kind, name)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}

    def differing(good: str) -> int:
        other = {path.name: path.read_bytes() for path in golden(kind, good).iterdir()}
        return sum(contents.get(file) != other.get(file) for file in {*contents, *other})

    assert 1 <= min(differing(good) for of, good in GOOD if of == kind) <= 2
