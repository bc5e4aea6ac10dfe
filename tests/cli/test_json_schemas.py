"""Every command's --json is what its schema says, no field more or less, on a real run; and the schemas are current."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from emloc_tools.cli import main
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.wording import plain
from formats.make_json_schemas import FOLDER, schemas
from tests import pico
from tests.cli.conftest import Invoke
from tests.conftest import Run
from tests.stages.demo_commands import Commands

LINES = {
    "plan": "plan --base {base} --memory 1MiB --sequence-length 8 --dtype float32",
    "calibrate": "calibrate --base {base} --data {data} --gradients --samples 2 --device cpu --output out",
    "merge-calibration": "merge-calibration {calibration} {other} --output out",
    "build-emulator": "build-emulator --base {base} --calibration {calibration} --ratio 0.5 --output out",
    "truncate": "truncate --emulator {emulator} --ratio 0.2 --output out",
    "export": "export --emulator {emulator} --to dense --output out",
    "trainer-config": "trainer-config --emulator {emulator} --data {data} --trainer transformers --output out",
    "correct": "correct --emulator {emulator} --adapter {adapter} --base {base} --data {data} --samples 2 --output out",
    "refine": "refine --adapter {corrected} --base {base} --data {data} --steps 1 --output out",
    "verify": "verify --adapter {corrected} --base {base} --for vllm",
    "merge": "merge --base {base} --adapter {corrected} --output out",
    "evaluate": "evaluate --base {base} --adapter {corrected} --data {data} --samples 2 --device cpu",
    "inspect": "inspect {emulator}",
    "report": "report {corrected} --output report.md",
    "push": "push {corrected} --repo org/name --dry-run",
    "demo": "demo --output out",
}
OTHERS = {"fit-head", "record-inputs", "pull"}  # that need a classifier, a pipeline and a Hub; run below, or there


def validator(name: str) -> jsonschema.Draft202012Validator:
    """The stored schema of a command."""
    return jsonschema.Draft202012Validator(json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8")))


def test_the_schemas_are_current() -> None:
    for path, text in schemas().items():
        stored = path.read_text(encoding="utf-8") if path.exists() else "nothing"
        assert stored == text, f"renew {path.name} with `python -m formats.make_json_schemas`"
        jsonschema.Draft202012Validator.check_schema(json.loads(text))


def test_every_command_has_a_schema_and_is_run_here() -> None:
    stored = {path.name.removesuffix(".schema.json") for path in FOLDER.glob("*.schema.json")}
    assert stored == {*main.commands, "report-file"}
    assert set(main.commands) == {*LINES, *OTHERS}


@pytest.fixture(scope="module")
def other(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration on other data than that of the run, to merge with it."""
    root = tmp_path_factory.mktemp("other")
    data = pico.save_texts(root / "more.jsonl", count=2, seed=1)
    calibrate(base=str(run.base), data=data, output=root / "calibration", device="cpu")
    return root / "calibration"


def of_run(name: str, run: Run, other: Path, invoke: Invoke) -> Any:
    """What a command prints on the run's folders."""
    places = {key: getattr(run, key) for key in ("base", "data", "calibration", "emulator", "adapter", "corrected")}
    places["other"] = other
    printed = invoke(*(word.format(**places) for word in LINES[name].split()), "--json", "--quiet")
    assert printed.status == 0, printed.stderr
    return json.loads(printed.stdout)


@pytest.mark.parametrize("name", LINES)
def test_what_is_printed_is_what_the_schema_says(
    name: str, run: Run, other: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "demo":
        Commands(monkeypatch)
    found = of_run(name, run, other, invoke)
    validator(name).validate(found)
    # The control: the schema is closed on both sides.
    for field in found:
        assert not validator(name).is_valid({key: value for key, value in found.items() if key != field}), field
    assert not validator(name).is_valid({**found, "another": 1})


def test_fit_head_prints_its_schema(invoke: Invoke, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", "gpt2")
    records = [{"text": f"{word} {number}", "label": word} for number in range(10) for word in ("left", "right")]
    data = pico.write_jsonl(tmp_path / "data.jsonl", records)
    printed = invoke(
        "fit-head", "--base", tmp_path / "base", "--data", data, "--device", "cpu", "--output", "out", "--json"
    )
    validator("fit-head").validate(json.loads(printed.stdout))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="diffusers has no release for it")
def test_record_inputs_prints_its_schema(invoke: Invoke, tmp_path: Path) -> None:
    from tests.diffusion import pico_flux

    pico_flux.save_pipeline(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a red dog\n")
    size = [word for name, value in pico_flux.SIZE.items() for word in ("--set", f"{name}={value}")]
    given = ("--base", tmp_path / "pipeline", "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--keep", 1, *size)
    printed = invoke("record-inputs", *given, "--device", "cpu", "--output", "out", "--json")
    validator("record-inputs").validate(json.loads(printed.stdout))


def test_the_file_of_a_report_is_what_its_schema_says(run: Run, invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("report", run.base.parent, "--output", "report.json").status == 0
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    validator("report-file").validate(found)
    assert len(found["subjects"]) == 5
    assert not validator("report-file").is_valid({**found, "links": plain([{"made": "x"}])})


@pytest.mark.parametrize("kind", ["base", "calibration", "emulator", "adapter", "corrected"])
def test_inspect_prints_its_schema_of_every_kind(kind: str, run: Run, invoke: Invoke) -> None:
    found = json.loads(invoke("inspect", getattr(run, kind), "--json").stdout)
    validator("inspect").validate(found)
