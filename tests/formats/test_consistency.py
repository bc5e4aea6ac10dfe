"""Specifications, schemas, models, golden folders and readers speak of the same rules."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import jsonschema
import pytest

import emloc_tools.files
from emloc_tools.files.plan import PlanV1
from formats.make_golden import make
from formats.make_schemas import MODELS, schema_text
from tests.formats.golden import BAD, EXPECTED, FORMATS, GOOD, KINDS, MANIFESTS, golden

LETTER = {"calibration": "C", "emulator": "E", "adapter": "A"}
SCHEMA_RULE = {"calibration": "C3", "emulator": "E3", "adapter": "A9"}
OF_JSON_OR_VERSION = {"C1", "C2", "E1", "E2", "A7", "A8"}


def spec_rules(kind: str) -> dict[str, str]:
    """The text of every numbered rule."""
    text = (FORMATS / kind / "SPEC.md").read_text(encoding="utf-8")
    items = re.findall(r"^- \*\*([A-Z]\d+)\*\* (.*(?:\n  .*)*)", text, re.MULTILINE)
    assert len({number for number, _ in items}) == len(items)
    return {number: " ".join(rule.split()) for number, rule in items}


def rules_in_code() -> set[str]:
    """Every string constant of the readers that is a rule's number."""
    rules = set()
    for path in Path(emloc_tools.files.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.fullmatch(r"[CEA]\d{1,2}", str(node.value)):
                rules.add(node.value)
    return rules


def schema(kind: str) -> jsonschema.Draft202012Validator:
    text = (FORMATS / kind / "schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


@pytest.mark.parametrize("kind", KINDS)
def test_rules_are_numbered_without_gap_and_each_is_one_sentence_of_must(kind: str) -> None:
    rules = spec_rules(kind)
    assert list(rules) == [f"{LETTER[kind]}{number}" for number in range(1, len(rules) + 1)]
    for number, rule in rules.items():
        assert "MUST" in rule, number
        assert rule.endswith("."), number
        assert not re.search(r"\. [A-Z]", rule), f"more than one sentence: {number} {rule}"


def test_the_readers_raise_exactly_the_specified_rules() -> None:
    assert rules_in_code() == {rule for kind in KINDS for rule in spec_rules(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_has_a_bad_folder_and_every_bad_folder_a_rule(kind: str) -> None:
    folders = {path.name for path in (FORMATS / kind / "golden").glob("bad-*")}
    assert folders == set(EXPECTED[kind])
    assert {name.split("-")[1] for name in folders} == set(spec_rules(kind))
    assert all(name.split("-")[1] == expected["rule"] for name, expected in EXPECTED[kind].items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_is_that_of_the_model(kind: str) -> None:
    stored = (FORMATS / kind / "schema.json").read_text(encoding="utf-8")
    assert stored == schema_text(kind), "the schema is stale; renew it with `python -m formats.make_schemas`"


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_is_itself_valid_and_closed(kind: str) -> None:
    validator = schema(kind)
    validator.check_schema(validator.schema)
    objects = list(validator.schema["$defs"].values())
    if len(MODELS[kind]) == 1:
        objects.append(validator.schema)
    else:  # only a choice between versions
        assert set(validator.schema) == {"$schema", "$defs", "oneOf"}
        assert len(validator.schema["oneOf"]) == len(MODELS[kind])
    assert all(item["additionalProperties"] is False for item in objects)
    assert all(item["required"] == list(item["properties"]) for item in objects)


@pytest.mark.parametrize(("kind", "name"), GOOD)
def test_schema_and_model_accept_the_manifests_of_good_folders(kind: str, name: str) -> None:
    path = golden(kind, name) / MANIFESTS[kind]
    if not path.exists():  # an adapter as it was trained has none
        assert kind == "adapter"
        return
    manifest = json.loads(path.read_text(encoding="utf-8"))
    schema(kind).validate(manifest)
    model = MODELS[kind][manifest["format_version"] - 1]
    assert model.model_validate(manifest).model_dump(mode="json") == manifest


@pytest.mark.parametrize(("kind", "name"), GOOD)
def test_the_schema_refuses_a_good_manifest_under_every_other_version(kind: str, name: str) -> None:
    path = golden(kind, name) / MANIFESTS[kind]
    if not path.exists():
        assert kind == "adapter"
        return
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for version in {0, 1, 2, 3, 4, 5, 6} - {manifest["format_version"]}:
        assert not schema(kind).is_valid(manifest | {"format_version": version})


@pytest.mark.parametrize("kind", KINDS)
def test_good_folders_show_every_version(kind: str) -> None:
    paths = [golden(kind, name) / MANIFESTS[kind] for of, name in GOOD if of == kind]
    found = {json.loads(path.read_text(encoding="utf-8"))["format_version"] for path in paths if path.exists()}
    assert found == set(range(1, len(MODELS[kind]) + 1))


@pytest.mark.parametrize(("kind", "name"), BAD)
def test_the_schema_refuses_just_the_bad_folders_of_its_rule(kind: str, name: str) -> None:
    rule, path = EXPECTED[kind][name]["rule"], golden(kind, name) / MANIFESTS[kind]
    if rule in OF_JSON_OR_VERSION or not path.exists():
        return
    valid = schema(kind).is_valid(json.loads(path.read_text(encoding="utf-8")))
    assert valid == (rule != SCHEMA_RULE[kind])


def test_every_version_that_is_written_has_an_entry_in_changes() -> None:
    sections = re.split(r"^## ", (FORMATS / "CHANGES.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    entries = {
        section.split("\n", 1)[0]: [int(number) for number in re.findall(r"^### (\d+)", section, re.MULTILINE)]
        for section in sections
    }
    versions = {kind: [model.model_fields["format_version"].default for model in MODELS[kind]] for kind in KINDS}
    assert entries.pop("plan") == [PlanV1.model_fields["format_version"].default]  # a file, tested in test_plan.py
    assert entries == {kind: versions[kind][::-1] for kind in KINDS}
    assert all(found == list(range(1, len(found) + 1)) for found in versions.values())


def test_the_golden_folders_are_what_the_script_writes(tmp_path: Path) -> None:
    make(tmp_path)
    remedy = "renew the golden folders with `python -m formats.make_golden`, if the change is meant"
    for kind in KINDS:
        assert contents(tmp_path / kind / "golden") == contents(FORMATS / kind / "golden"), remedy


def test_the_golden_folders_stay_small() -> None:
    assert sum(path.stat().st_size for path in FORMATS.rglob("*") if path.is_file()) < 1_000_000


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
