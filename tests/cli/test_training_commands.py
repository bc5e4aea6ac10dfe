"""export and trainer-config: what they print, as text and as JSON, and how they fail."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.cli.conftest import UNREADABLE, Invoke
from tests.conftest import Run


def test_export_says_what_it_wrote_and_what_to_run_next(run: Run, invoke: Invoke) -> None:
    arguments = ("export", "--emulator", run.emulator, "--to", "dense", "--output", "dense")
    done = invoke(*arguments)
    assert done.status == 0
    layers = len(json.loads((run.emulator / "emulator.json").read_text())["layers"])
    assert re.search(rf"multiplied +{layers} weights", done.stdout)
    assert f"correct --emulator {run.emulator} --adapter LORA --base {run.base}" in done.stdout
    assert not UNREADABLE.search(done.stdout)
    again = invoke(*arguments)
    assert again.status == 1
    assert "pass --overwrite" in again.error


def test_export_prints_one_json_object(run: Run, invoke: Invoke) -> None:
    done = invoke("export", "--emulator", run.emulator, "--to", "dense", "--output", "dense", "--json")
    found = json.loads(done.stdout)
    note = json.loads(Path("dense", "emloc-export.json").read_text())
    assert (found["emulator"], found["multiplied"]) == (note["emulator"], note["multiplied"])
    assert found["nbytes"] < Path("dense", "model.safetensors").stat().st_size < found["nbytes"] + 20_000  # the header


def test_trainer_config_says_what_to_run(run: Run, invoke: Invoke) -> None:
    files = ("--emulator", run.emulator, "--data", run.data, "--output", "train.yaml")
    done = invoke("trainer-config", "--trainer", "llamafactory", *files)
    assert done.status == 0
    assert {path.name for path in Path().iterdir()} == {"train.yaml", "dataset_info.json"}
    assert "llamafactory-cli train train.yaml" in done.stdout
    assert f"emloc-tools correct --emulator {run.emulator} --adapter lora" in done.stdout
    assert not UNREADABLE.search(done.stdout)
    again = invoke("trainer-config", "--trainer", "llamafactory", *files)
    assert again.status == 1
    assert "train.yaml already exists" in again.error


def test_trainer_config_prints_one_json_object(run: Run, invoke: Invoke) -> None:
    files = ("--emulator", run.emulator, "--data", run.data, "--output", "train.py")
    done = invoke("trainer-config", "--trainer", "transformers", *files, "--rank", "2", "--json")
    found = json.loads(done.stdout)
    assert (found["files"], found["run"]) == (["train.py"], "python train.py")
    assert (found["settings"]["rank"], found["settings"]["alpha"]) == (2, 4)


def test_an_unknown_trainer_is_wrong_usage(run: Run, invoke: Invoke) -> None:
    files = ("--emulator", run.emulator, "--data", run.data, "--output", "train.py")
    assert invoke("trainer-config", "--trainer", "torchtune", *files).status == 2
    assert not list(Path().iterdir())
