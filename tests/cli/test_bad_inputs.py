"""Bad inputs: every one gets one readable line that says what was found, where, what was expected and what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import pico
from tests.cli.conftest import UNREADABLE, Invoke
from tests.conftest import Run

CALIBRATE = "calibrate --base {base} --data {data} --device cpu --output {out}"
BUILD = "build-emulator --base {base} --calibration {calibration} --output {out}"
PLAIN = "build-emulator --base {base} --output {out}"
TRUNCATE = "truncate --emulator {emulator} --output {out}"
CORRECT = "correct --emulator {emulator} --adapter {adapter} --base {base} --output {out}"
EVALUATE = "evaluate --base {base} --data {data} --device cpu"
DENSE = "merge --base {base} --adapter {corrected} --output {out}"
MERGE = "merge-calibration {calibration} {calibration} --output {out}"


@dataclass(frozen=True)
class Bad:
    """A command line with something wrong in it: what its message must say, in this order, and the exit status."""

    line: str
    says: tuple[str, ...]
    status: int = 1

    def __str__(self) -> str:
        return self.line.replace(" --output {out}", "").replace(" --device cpu", "")


def of(line: str, **changes: str) -> str:
    """A command line with other values of its placeholders."""
    for name, value in changes.items():
        line = line.replace("{" + name + "}", value)
    return line


TABLE = [
    # data
    Bad(of(CALIBRATE, data="nowhere.jsonl"), ("nowhere.jsonl does not exist", "expected JSONL")),
    Bad(of(CALIBRATE, data="{bad}/empty.jsonl"), ("empty.jsonl holds no sample", "expected one JSON object per line")),
    Bad(of(CALIBRATE, data="{bad}/broken.jsonl"), (r"broken\.jsonl:2: not JSON", "column 12")),
    Bad(of(CALIBRATE, data="{bad}/list.jsonl"), (r"list\.jsonl:1: list found, expected a JSON object",)),
    Bad(of(CALIBRATE, data="{bad}/keys.jsonl"), (r"keys\.jsonl:1: found the keys", "body", "expected `text`")),
    Bad(of(CALIBRATE, data="{bad}/number.jsonl"), (r"number\.jsonl:1: `text` is int, expected a string",)),
    Bad(of(EVALUATE, data="{base}"), (r"base does not exist|base is a folder", "expected JSONL")),
    Bad(
        of(CALIBRATE, data="{bad}/mask.safetensors"),
        ("LlamaForCausalLM cannot run on the inputs attention_mask", "any"),
    ),
    Bad(of(EVALUATE, data="{bad}/mask.safetensors"), ("inputs attention_mask hold neither input_ids nor labels",)),
    # bases
    Bad(of(CALIBRATE, base="no-such/model"), ("no-such/model is no local folder", "Hub")),
    Bad(of(CALIBRATE, base="./nowhere/at/all"), (r"\./nowhere/at/all does not exist", "--base takes", "org/name")),
    Bad(of(CALIBRATE, base="{data}"), (r"train\.jsonl is a file", "--base takes a model's folder or a Hub id")),
    Bad(of(CALIBRATE, base="{bad}/foreign"), (r"foreign has no config\.json", "--base takes")),
    *[
        Bad(of(line, base="{emulator}"), ("--base .*emulator is an emulator", r"which emulator\.json names"))
        for line in (CALIBRATE, PLAIN + " --ratio 0.5", CORRECT, DENSE, EVALUATE)
    ],
    Bad(of(CALIBRATE, base="{bad}/truncated"), (r"truncated/model\.safetensors", "the file was truncated")),
    Bad(of(PLAIN, base="{bad}/truncated") + " --ratio 0.5", (r"truncated/model\.safetensors", "was truncated")),
    Bad(of(CALIBRATE, base="{bad}/shard"), (r"index\.json", r"model-00002-of-\d+\.safetensors, which does not exist")),
    Bad(of(CALIBRATE, base="{bad}/tensor"), (r"model\.layers\.1\.mlp\.up_proj\.weight is not in the checkpoint",)),
    Bad(of(CALIBRATE, base="{bad}/nan"), (r"weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN",)),
    Bad(of(PLAIN, base="{bad}/nan") + " --ratio 0.5", (r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN",)),
    Bad(of(CALIBRATE, base="{bad}/pickled"), ("pickled holds no model.safetensors", "never unpickled")),
    # sizes
    Bad(PLAIN, ("give exactly one of --ratio, --params and --size",)),
    Bad(PLAIN + " --ratio 0.5 --size 1GiB", ("give exactly one of --ratio, --params and --size",)),
    Bad(PLAIN + " --ratio 0", ("--ratio 0 is outside 0 to 1", r"such as 0\.25")),
    Bad(PLAIN + " --ratio 1.5", (r"--ratio 1\.5 is outside 0 to 1", r"such as 0\.25")),
    Bad(PLAIN + " --ratio half", ("--ratio", "'half' is not a valid float"), 2),
    Bad(PLAIN + " --params 1K", ("--params 1,000 is too small", "rank 1 everywhere")),
    Bad(PLAIN + " --size 1TB", ("--size 1,000,000,000,000 is not below the base itself",)),
    Bad(PLAIN + " --size 24potatoes", ("--size", "'24potatoes' is not a number with one of the units", "8GiB"), 2),
    Bad(PLAIN + " --params 2GiB", ("--params", "'2GiB' is not a number with one of the units K, M, B, T", "2B"), 2),
    Bad(PLAIN + " --size 0", ("--size", "'0' is less than 1"), 2),
    Bad(TRUNCATE + " --ratio 0.9", ("the emulator in .* is not larger than that", "choose less")),
    # outputs
    Bad(of(CALIBRATE, out="{bad}/ours"), ("ours already exists", "--output", "--overwrite")),
    Bad(of(CALIBRATE, out="{bad}/foreign"), ("foreign already exists", "--output", "--overwrite")),
    Bad(of(CALIBRATE, out="{bad}/foreign") + " --overwrite", ("foreign holds files", "did not write")),
    Bad(of(CALIBRATE, out="{bad}/file"), ("file exists and is not a folder", "--output")),
    Bad(of(CALIBRATE, out="{bad}/link") + " --overwrite", ("link exists and is not a folder", "--output")),
    Bad(of(CALIBRATE, out="{bad}/file/below"), ("cannot write into .*file: .*file is a file, not a folder",)),
    Bad(of(TRUNCATE, out="{emulator}") + " --ratio 0.1 --overwrite", ("would replace the input", "another --output")),
    # layers
    Bad(CALIBRATE + " --targets (q_proj", (r"--targets '\(q_proj' is not a regular expression", "position 0")),
    Bad(CALIBRATE + " --targets nothing", ("--targets 'nothing' matches no linear layer", "there are 22, such as")),
    Bad(CALIBRATE + " --exclude nothing", ("--exclude 'nothing' matches no linear layer", "such as")),
    Bad(CALIBRATE + " --exclude .", (r"--exclude '\.' leaves no layer",)),
    # calibrations
    Bad(
        of(BUILD, calibration="{bad}/foreign") + " --ratio 0.5",
        (r"foreign holds no calibration\.json", "expected the folder"),
    ),
    Bad(of(BUILD, calibration="nowhere") + " --ratio 0.5", ("nowhere does not exist", "folder of a calibration")),
    Bad(of(BUILD, calibration="{data}") + " --ratio 0.5", (r"train\.jsonl is a file", "folder of a calibration")),
    Bad(of(BUILD, base="{bad}/other") + " --ratio 0.5", ("is not the weight that was calibrated", "use that base, or")),
    Bad(MERGE, (r"train\.jsonl that --seed 0 chose", "merge calibrations of different data")),
    Bad("merge-calibration {calibration} --output {out}", ("give at least two calibrations",)),
    Bad("merge-calibration --output {out}", ("Missing argument 'CALIBRATION...'",), 2),
    # emulators and adapters
    Bad(of(CORRECT, emulator="{bad}/foreign"), (r"foreign holds no emulator\.json", "expected the folder")),
    Bad(of(CORRECT, emulator="nowhere"), ("nowhere does not exist", "expected the folder of an emulator")),
    Bad(
        of(TRUNCATE, emulator="{calibration}") + " --ratio 0.1",
        (r"calibration holds no emulator\.json", "expected the folder"),
    ),
    Bad(of(CORRECT, adapter="nowhere"), ("nowhere does not exist", "expected the folder of a PEFT adapter")),
    Bad(of(CORRECT, adapter="{bad}/foreign"), (r"holds no adapter_config\.json", "folder of a PEFT adapter")),
    Bad(of(CORRECT, adapter="{bad}/pickled-adapter"), (r"adapter_model\.bin", "never opened", "safetensors")),
    Bad(of(CORRECT, adapter="{corrected}"), ("corrected is corrected already", "use it with its base")),
    Bad(of(CORRECT, base="{bad}/other"), ("is not the weight that the emulator", "pass that very model as --base")),
    Bad("correct --emulator {emulator} --adapter {adapter} --base {base}", ("Missing option '--output'",), 2),
    Bad(CORRECT + " --clamp -1", ("--clamp -1 must be a number above 0", "none for no limit")),
    Bad(CORRECT + " --clamp nan", ("--clamp nan must be a number above 0", "none for no limit")),
    Bad(CORRECT + " --clamp inf", ("--clamp inf must be a number above 0", "none for no limit")),
    Bad(CORRECT + " --clamp abc", ("--clamp", "'abc' is neither a number nor none"), 2),
    Bad(of(DENSE, corrected="nowhere"), ("nowhere does not exist", "expected the folder of a PEFT adapter")),
    Bad(of(DENSE, corrected="{base}"), (r"base holds no adapter_config\.json", "expected the folder")),
    Bad(of(DENSE, corrected="{bad}/pickled-adapter"), (r"adapter_model\.bin", "never opened", "safetensors")),
    Bad(of(DENSE, corrected="{adapter}"), ("was trained on the emulator", "not corrected", "run emloc-tools correct")),
    Bad(of(DENSE, base="{bad}/nan"), (r"the weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN",)),
    Bad(of(DENSE, base="{bad}/truncated"), (r"truncated/model\.safetensors", "the file was truncated")),
    Bad(of(DENSE, base="{bad}/tensor"), (r"model\.layers\.1\.mlp\.up_proj\.weight is not in the checkpoint",)),
    Bad(of(DENSE, base="{bad}/shard"), (r"index\.json", r"model-00002-of-\d+\.safetensors, which does not exist")),
    Bad(of(DENSE, out="{base}") + " --overwrite", ("would replace the input", "another --output")),
    Bad(of(DENSE, out="{bad}/foreign") + " --overwrite", ("foreign holds files", "did not write")),
    Bad(DENSE + " --interpolate 0.5", ("--interpolate needs --emulator",)),
    Bad(DENSE + " --emulator {emulator}", ("--emulator needs --interpolate",)),
    Bad(DENSE + " --emulator nowhere --interpolate 0.5", ("nowhere does not exist", "folder of an emulator")),
    Bad(DENSE + " --emulator {emulator} --interpolate 0.5", ("is corrected for the base already", "without")),
    Bad(of(DENSE, corrected="{adapter}") + " --emulator {emulator} --interpolate 2", ("--interpolate 2 is outside 0",)),
    Bad(DENSE + " --interpolate half", ("--interpolate", "'half' is not a valid float"), 2),
    Bad(
        of(DENSE, base="{bad}/other", corrected="{adapter}") + " --emulator {emulator} --interpolate 0.5",
        ("is not the weight that the emulator", "pass that very model as --base"),
    ),
    Bad("merge --base {base} --output {out}", ("Missing option '--adapter'",), 2),
    Bad(EVALUATE + " --adapter nowhere", ("nowhere does not exist", "PEFT adapter")),
    Bad("evaluate --data {data}", ("give --base, --emulator or both",)),
    Bad(
        "evaluate --emulator {emulator} --adapter {corrected} --data {data}", ("corrected is corrected", "give --base")
    ),
    Bad("inspect {calibration} --targets q_proj", (r"holds calibration\.json", "of a base only, leave it out")),
    Bad("inspect nowhere", ("nowhere does not exist", "inspect takes a base, a folder")),
    Bad("inspect no/where", ("no/where is no local folder", "")),
    # devices
    *[
        Bad(line.replace(" --device cpu", "") + f" --device {device}", (f"--device {device} cannot be used here", ""))
        for line in (CALIBRATE, PLAIN + " --ratio 0.5", CORRECT, DENSE, EVALUATE)
        for device in ("cuda:99", "nonsense")
    ],
    # usage
    Bad("calibrat", ("No such command 'calibrat'",), 2),
    Bad("calibrate --base {base} --output {out}", ("Missing option '--data'",), 2),
    Bad(CALIBRATE + " --samples 0", ("--samples", "0 is not in the range"), 2),
    Bad(CALIBRATE + " --sample 3", ("No such option", "--sample"), 2),
]


@pytest.fixture(scope="module")
def bad(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of damaged things."""
    root = tmp_path_factory.mktemp("bad")
    for name, text in {
        "empty.jsonl": "\n\n",
        "broken.jsonl": '{"text": "fine"}\n{"text": "a\n',
        "list.jsonl": '["text"]\n',
        "keys.jsonl": '{"body": "words"}\n',
        "number.jsonl": '{"text": 3}\n',
        "file": "occupied",
    }.items():
        (root / name).write_text(text)
    save_file({"0/attention_mask": torch.ones(1, 4, dtype=torch.long)}, root / "mask.safetensors")
    (root / "foreign").mkdir()
    (root / "foreign" / "notes.txt").write_text("mine")
    shutil.copytree(run.calibration, root / "ours")
    (root / "link").symlink_to(root / "ours")
    pico.save_model(root / "other", seed=1)
    shutil.copytree(run.base, root / "truncated")
    with (root / "truncated" / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    pico.save_model(root / "shard", max_shard_size="50KB")
    next(iter(sorted((root / "shard").glob("model-00002-*")))).unlink()
    _with_weights(run, root / "tensor", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    _with_weights(run, root / "nan", lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    shutil.copytree(run.base, root / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(run.model.state_dict(), root / "pickled" / "pytorch_model.bin")
    shutil.copytree(run.adapter, root / "pickled-adapter", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, root / "pickled-adapter" / "adapter_model.bin")
    return root


def _with_weights(run: Run, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    shutil.copytree(run.base, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_bad_input_gets_one_readable_line(case: Bad, run: Run, bad: Path, tmp_path: Path, invoke: Invoke) -> None:
    places = {
        "base": run.base,
        "data": run.data,
        "calibration": run.calibration,
        "emulator": run.emulator,
        "adapter": run.adapter,
        "corrected": run.corrected,
        "bad": bad,
        "out": tmp_path / "out",
    }
    printed = invoke(*[word.format(**places) for word in case.line.split()])
    assert printed.status == case.status, printed.stderr
    assert printed.stdout == ""
    assert re.search(".*".join(case.says), printed.error), printed.error
    assert not UNREADABLE.search(printed.error), printed.error
    assert not re.search(r"\s{2,}", printed.error)
    assert list(tmp_path.iterdir()) == []
    if case.status == 1:
        assert "Usage:" not in printed.stderr


def test_an_unwritable_parent_is_named(
    run: Run, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **options: Any) -> str:
        raise PermissionError(13, "Permission denied", "locked")

    monkeypatch.setattr("tempfile.mkdtemp", refused)  # root may write everywhere
    printed = invoke("calibrate", "--base", run.base, "--data", run.data, "--device", "cpu", "--output", "locked/out")
    assert printed.status == 1
    assert printed.error == f"Error: cannot write into {tmp_path / 'locked'}: Permission denied"


def test_a_full_disk_is_named(run: Run, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("emloc_tools.files.emulator_writer.EmulatorWriter.write_factors", full)
    printed = invoke("build-emulator", "--base", run.base, "--ratio", "0.5", "--output", "out")
    assert printed.status == 1
    assert printed.error == f"Error: cannot write into {tmp_path}: No space left on device; nothing was kept"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_be_read_is_named(
    run: Run, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("emloc_tools.stages.calibrate.file_hash", refused)  # root may read everything
    printed = invoke("calibrate", "--base", run.base, "--data", run.data, "--device", "cpu", "--output", "out")
    assert printed.status == 1
    assert printed.error == f"Error: {run.data}: Permission denied; nothing was left under the final name"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_as_output(run: Run, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "out").mkdir()
    assert invoke("build-emulator", "--base", run.base, "--ratio", "0.5", "--output", "out", "--quiet").status == 0
    assert (tmp_path / "out" / "emulator.json").is_file()


def test_our_own_output_is_replaced_where_that_is_asked_for(run: Run, tmp_path: Path, invoke: Invoke) -> None:
    build = ("build-emulator", "--base", run.base, "--output", "out", "--quiet")
    assert invoke(*build, "--ratio", "0.5").status == 0
    before = (tmp_path / "out" / "emulator.json").read_bytes()
    assert invoke(*build, "--ratio", "0.2").status == 1
    assert (tmp_path / "out" / "emulator.json").read_bytes() == before
    assert invoke(*build, "--ratio", "0.2", "--overwrite").status == 0
    assert (tmp_path / "out" / "emulator.json").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
