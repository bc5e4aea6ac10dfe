"""Sizes and counts as users write them."""

from __future__ import annotations

import click
import pytest

from emloc_tools.cli.options import BYTES, PARAMETERS


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 24 * 1024**3),
        ("24gib", 24 * 1024**3),
        ("1.5 MiB", 1_572_864),
        ("0.1GB", 100_000_000),
        ("512", 512),
        ("512B", 512),
        ("3KB", 3000),
        ("3KiB", 3072),
        ("2TB", 2 * 10**12),
        ("9007199254740993B", 9_007_199_254_740_993),  # more than a float holds exactly
    ],
)
def test_bytes_tell_decimal_from_binary_units(text: str, nbytes: int) -> None:
    assert BYTES.convert(text, None, None) == nbytes


@pytest.mark.parametrize(
    ("text", "count"), [("2B", 2 * 10**9), ("1.5b", 15 * 10**8), ("350M", 350_000_000), ("7K", 7000), ("7", 7)]
)
def test_parameters_count_in_powers_of_a_thousand(text: str, count: int) -> None:
    assert PARAMETERS.convert(text, None, None) == count


@pytest.mark.parametrize("text", ["24 potatoes", "", "GB", "-1GB", "1e9", "1,5GB", "0", "0.4", "nan", "٣GB", "1GB2"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"such as 8GiB|is less than 1"):
        BYTES.convert(text, None, None)


def test_a_unit_of_the_other_kind_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="units K, M, B, T, such as 2B"):
        PARAMETERS.convert("2GB", None, None)
