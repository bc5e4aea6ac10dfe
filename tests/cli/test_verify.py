"""What `verify` prints: a table, the verdict in the exit status, one line that says why, and what to run next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapters import subjects
from tests.adapters.subjects import PREFIX, Subject
from tests.cli.conftest import UNREADABLE, Invoke


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subjects.make(tmp_path_factory.mktemp("subject"), target_modules=["q_proj", "down_proj"], use_rslora=True)


def test_an_adapter_that_applies_is_shown_by_groups_and_exits_with_0(subject: Subject, invoke: Invoke) -> None:
    printed = invoke("verify", "--adapter", subject.adapter, "--base", subject.base, "--for", "vllm", columns=200)
    assert (printed.status, printed.stderr) == (0, "")
    lines = printed.stdout.splitlines()
    assert f"Adapter in {subject.adapter}" in lines[0]
    assert "found by PEFT  12 of 12 tensors" in printed.stdout
    header, *rows = (line.split() for line in lines if line.startswith(("layer ", "model.")))
    assert header == ["layer", "pairs", "found", "shape", "rank", "scaling"]
    assert rows == [
        ["model.layers.*.mlp.down_proj", "3", "3", "32", "x", "48", "4", "3"],
        ["model.layers.*.self_attn.q_proj", "3", "3", "32", "x", "32", "4", "3"],
    ]
    assert "use: --max-lora-rank 8" in printed.stdout
    assert lines[-1] == "Applies to the base, and is served by vllm"
    assert not UNREADABLE.search(printed.stdout)


def test_one_that_does_not_apply_is_shown_as_well_and_exits_with_1(
    subject: Subject, invoke: Invoke, tmp_path: Path
) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "lora", lambda name: name.removeprefix(PREFIX))
    printed = invoke("verify", "--adapter", adapter, "--base", subject.base)
    assert printed.status == 1
    assert "found by PEFT  0 of 12 tensors" in printed.stdout
    assert printed.stdout.splitlines()[-1] == "Does not apply to the base"
    assert printed.error.startswith("Error: 12 of 12 tensors of ")
    assert printed.error.endswith("write an adapter that has these with --fix and --output")
    assert not UNREADABLE.search(printed.error)


def test_a_program_that_would_not_serve_it_decides_the_status(subject: Subject, invoke: Invoke) -> None:
    words = ("verify", "--adapter", subject.adapter, "--base", subject.base)
    assert invoke(*words, "--for", "peft", "--for", "vllm").status == 0
    printed = invoke(*words, "--for", "peft", "--for", "llama.cpp")
    assert printed.status == 1
    assert printed.stdout.splitlines()[-1] == "Applies to the base, but is not served everywhere as it is"
    assert "does not read use_rslora" in printed.error
    assert "--fold-scaling" in printed.error


def test_what_was_written_is_named_and_applies(subject: Subject, invoke: Invoke, tmp_path: Path) -> None:
    adapter = subjects.changed(
        subject.adapter, tmp_path / "lora", lambda name: name.removeprefix(PREFIX), alpha_pattern={"down_proj": 9}
    )
    words = ("verify", "--adapter", adapter, "--base", subject.base, "--for", "llama.cpp")
    printed = invoke(*words, "--fix", "--fold-scaling", "--output", "mended", columns=200)
    assert (printed.status, printed.stderr) == (0, "")
    assert "Adapter in mended" in printed.stdout
    old = "model.layers.0.mlp.down_proj.lora_A.weight"
    assert f"renamed 12 tensors, such as {old} to {PREFIX}{old}" in " ".join(printed.stdout.split())
    assert "B of 3 pairs, which now have one alpha" in printed.stdout
    assert "use: convert_lora_to_gguf.py --base BASE mended" in printed.stdout
    assert "partial" not in printed.stdout
    again = invoke("verify", "--adapter", "mended", "--base", subject.base, "--for", "llama.cpp", "--for", "sglang")
    assert again.status == 0


def test_json_has_the_verdict_and_the_reason(subject: Subject, invoke: Invoke, tmp_path: Path) -> None:
    words = ("verify", "--base", subject.base, "--json", "--adapter")
    good = json.loads(invoke(*words, subject.adapter).stdout)
    assert (good["refusal"], good["matching"], good["tensors"]) == (None, 12, 12)
    adapter = subjects.changed(subject.adapter, tmp_path / "lora", lambda name: f"module.{name}")
    printed = invoke(*words, adapter)
    bad = json.loads(printed.stdout)
    assert printed.status == 1
    assert printed.error == f"Error: {bad['refusal']}"
    assert bad["problems"] == [bad["refusal"]]


def test_quiet_prints_the_reason_alone(subject: Subject, invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("verify", "--adapter", subject.adapter, "--base", subject.base, "--quiet").stdout == ""
    adapter = subjects.changed(subject.adapter, tmp_path / "lora", lambda name: f"module.{name}")
    printed = invoke("verify", "--adapter", adapter, "--base", subject.base, "--quiet")
    assert (printed.status, printed.stdout, printed.stderr.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--adapter", "nowhere"), "nowhere does not exist; expected the folder of a PEFT adapter"),
        (("--fix",), "--fix and --fold-scaling write an adapter; add --output"),
        (("--output", "out"), "--output needs --fix or --fold-scaling, which say what to write there"),
        (("--emulator", "nowhere"), "nowhere does not exist; expected the folder of an emulator"),
        (("--base", "a/b/c/d"), "a/b/c/d does not exist; --base takes a model's folder or a Hub id"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_line(subject: Subject, invoke: Invoke, words: tuple[str, ...], message: str) -> None:
    given = {"--adapter": str(subject.adapter), "--base": str(subject.base)}
    options = [word for pair in given.items() if pair[0] not in words for word in pair]
    printed = invoke("verify", *options, *words)
    assert printed.status == 1
    assert message in printed.error
    assert list(Path().iterdir()) == []
