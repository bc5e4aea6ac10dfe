"""The figures that docs/comparison.md takes from the bench are those that the bench recorded."""

from __future__ import annotations

import re

from tests.docs.test_docs import ROOT

BEDS = ("far", "near", "skill")
RATIO = "0.25"
STAND_INS = {
    "emulator with gradients": "gradient",
    "emulator, the paper's settings": "paper",
    "plain SVD, no data": "plain SVD",
    "magnitudes pruned": "magnitudes pruned",
    "layers dropped": "layers dropped",
}


def rows(text: str) -> list[list[str]]:
    """The rows of all tables in a text, as cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def recorded(bed: str) -> dict[str, str]:
    """The gain closed by each stand-in on the shipped base, to a percent, as the bench wrote it down."""
    text = (ROOT / "benchmarks" / "results" / "transfer.md").read_text(encoding="utf-8")
    section = text.partition(f"### Base shipped, bed {bed}\n")[2].partition("\n### ")[0]
    columns, *table = rows(section)
    place = columns.index("gain closed")
    return {row[1]: row[place].partition(" ")[0] for row in table if row[0] == RATIO}


def test_the_gains_of_the_page_are_those_of_the_bench() -> None:
    found = {row[0]: row[2:] for row in rows((ROOT / "docs" / "comparison.md").read_text(encoding="utf-8"))}
    gains = [recorded(bed) for bed in BEDS]
    expected = {name: [gain[key] for gain in gains] for name, key in STAND_INS.items()}
    assert {name: found.get(name) for name in STAND_INS} == expected
    assert all(re.fullmatch(r"-?\d+%", cell) for cells in expected.values() for cell in cells)


def test_the_plan_of_the_24_gb_page_is_the_one_that_is_recorded() -> None:
    page = (ROOT / "docs" / "24gb.md").read_text(encoding="utf-8")
    plan = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    ratio = re.search(r"ratio (\d\.\d+): \d+ factored layers", plan)
    peaks = dict(re.findall(r"^(emulator, training|base, training|base, inference) +(\d+\.\d) GiB", plan, re.MULTILINE))
    weights = re.search(r"^base, training +\S+ GiB +(\d+)\.\d GiB", plan, re.MULTILINE)
    assert ratio is not None
    assert weights is not None
    assert f"an emulator with {ratio[1]} of each" in page
    assert f"trains in {peaks['emulator, training']} GiB" in page
    assert f"takes {weights[1]} GiB in bfloat16 and {float(peaks['base, training']):.0f} GiB to train" in page
