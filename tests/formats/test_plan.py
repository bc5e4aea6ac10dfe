"""The plan format: its schema, its golden files, and the rules that each bad one breaks."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from emloc_tools.errors import FormatError
from emloc_tools.files.plan import read_plan
from formats.make_plan_golden import GOLDEN, HERE, files, good, schema_text

SPECIFIED = re.findall(r"^- \*\*(P\d+)\*\* ", (HERE / "SPEC.md").read_text(encoding="utf-8"), re.MULTILINE)
GOOD = [name for name in files() if name.startswith("ok-")]
BAD = [name for name in files() if name.startswith("bad-")]


def test_stored_files_are_what_the_generator_writes() -> None:
    assert (HERE / "schema.json").read_text(encoding="utf-8") == schema_text()
    stored = {path.name: path.read_text(encoding="utf-8") for path in GOLDEN.iterdir()}
    assert stored == {name: text + "\n" for name, text in files().items()}, "run `python -m formats.make_plan_golden`"


def test_every_rule_has_a_bad_file() -> None:
    assert SPECIFIED == ["P1", "P2", "P3", "P4"]
    assert {name.split("-")[1] for name in BAD} == set(SPECIFIED)


@pytest.mark.parametrize("name", GOOD)
def test_good_files_are_read_as_they_are(name: str) -> None:
    assert read_plan(GOLDEN / name).model_dump(mode="json") == json.loads(files()[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_the_rule_in_their_name(name: str) -> None:
    with pytest.raises(FormatError) as refused:
        read_plan(GOLDEN / name)
    assert refused.value.rule == name.split("-")[1]
    assert name in str(refused.value)


@pytest.mark.parametrize("name", [name for name in BAD if name.split("-")[1] in ("P2", "P3")])
def test_the_schema_refuses_what_the_reader_does(name: str) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
    validator.check_schema(validator.schema)
    assert validator.is_valid(good())
    assert not validator.is_valid(json.loads(files()[name]))
