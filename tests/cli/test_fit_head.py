"""What `emloc-tools fit-head` prints, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from emloc_tools.stages.build_emulator import build_emulator
from tests import pico
from tests.cli.conftest import UNREADABLE, Invoke


def words(folder: Path, records: list[dict[str, object]], *, padded: bool = True) -> list[object]:
    """A command line for a new base and labelled texts in `folder`."""
    pico.save_model(folder / "base", "gpt2")
    if not padded:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder / "base")
    data = pico.write_jsonl(folder / "data.jsonl", records)
    return ["fit-head", "--base", folder / "base", "--data", data, "--device", "cpu", "--output", folder / "out"]


TOLD: list[dict[str, object]] = [
    {"text": f"{word} {number}", "label": word} for number in range(10) for word in ("left", "right")
]


def test_the_result_says_what_was_fitted_how_good_it_is_and_what_comes_next(tmp_path: Path, invoke: Invoke) -> None:
    printed = invoke(*words(tmp_path, TOLD), columns=200)
    assert printed.status == 0
    assert "2: left, right" in printed.stdout
    assert "score.weight (64 parameters)" in printed.stdout
    assert "16 samples: loss" in printed.stdout
    assert "4 samples: loss" in printed.stdout
    assert "1 shared with the base, 0 copied, 1 written" in printed.stdout
    assert f"emloc-tools calibrate --base {tmp_path / 'out'} --data" in printed.stdout
    assert "Warning" not in printed.stderr
    assert not UNREADABLE.search(printed.stdout + printed.stderr)


def test_json_holds_the_whole_result(tmp_path: Path, invoke: Invoke) -> None:
    printed = invoke(*words(tmp_path, TOLD), "--json", "--weight-decay", "0.5", "--held-out", "0", "--seed", "1")
    result = json.loads(printed.stdout)
    assert result["labels"] == {"left": 0, "right": 1}
    assert (result["weight_decay"], result["tried"], result["after"]) == (0.5, {}, None)
    assert result["fitted"]["samples"] == 20
    assert result["minimum"]["converged"] is True
    note = json.loads((tmp_path / "out" / "emloc-head.json").read_text())
    assert note["fitted"] == result["fitted"]


def test_a_head_no_better_than_its_most_frequent_label_is_warned_of(tmp_path: Path, invoke: Invoke) -> None:
    same: list[dict[str, object]] = [{"text": "the same text", "label": number % 2} for number in range(20)]
    printed = invoke(*words(tmp_path, same))
    assert printed.status == 0
    assert (
        "on held-out samples the head is right in 50.0%, and the most frequent label alone in 50.0%" in printed.stderr
    )


def test_a_tokenizer_without_padding_is_warned_of(tmp_path: Path, invoke: Invoke) -> None:
    printed = invoke(*words(tmp_path, TOLD, padded=False))
    assert "the tokenizer pads with another token, or none; the model takes 2 for padding" in printed.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 2


def test_a_bad_label_is_one_line(tmp_path: Path, invoke: Invoke) -> None:
    printed = invoke(*words(tmp_path, [*TOLD, {"text": "x", "label": None}]))
    assert printed.status == 1
    assert "data.jsonl: `label` is None, expected a text or a whole number" in printed.error
    assert not (tmp_path / "out").exists()


def test_correct_speaks_of_labels_and_warns_of_a_head_trained_on_the_emulator(tmp_path: Path, invoke: Invoke) -> None:
    invoke(*words(tmp_path, TOLD), "--quiet")
    build_emulator(base=str(tmp_path / "out"), ratio=0.5, output=tmp_path / "emulator")
    printed = {}
    for name, options in (("frozen", {"exclude_modules": ["score"], "task_type": None}), ("along", {})):
        pico.save_lora(tmp_path / name, tmp_path / "emulator", **{"task_type": "SEQ_CLS", **options})
        line = [
            "correct",
            "--emulator",
            tmp_path / "emulator",
            "--adapter",
            tmp_path / name,
            "--base",
            tmp_path / "out",
        ]
        data = ["--data", tmp_path / "data.jsonl"] if name == "frozen" else []
        printed[name] = invoke(*line, *data, "--output", tmp_path / f"{name}-corrected", columns=200)
        assert printed[name].status == 0
    assert "Loss per label on 20 samples, ± standard error" in printed["frozen"].stdout
    warning = "Warning: score of the task's head was trained on the emulator and is passed on as it is"
    assert warning in printed["along"].stderr
    assert warning not in printed["frozen"].stderr


def test_evaluate_shows_accuracy_and_samples_of_a_classifier(tmp_path: Path, invoke: Invoke) -> None:
    invoke(*words(tmp_path, TOLD), "--quiet")
    printed = invoke("evaluate", "--base", tmp_path / "out", "--data", tmp_path / "data.jsonl", "--device", "cpu")
    heading, row = printed.stdout.splitlines()[:2]
    assert heading.split() == ["model", "adapter", "loss", "accuracy", "samples"]
    assert row.split()[0] == "base"
    assert row.split()[-1] == "20"
