"""What `correct` prints and how it exits, with the losses of held-out samples."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emloc_tools.cli import heldout as shown
from emloc_tools.files.manifest import Candidate, DataRecord
from emloc_tools.stages.correct import correct
from emloc_tools.stages.selection import HeldOut
from tests import pico
from tests.cli.conftest import Invoke, Printed
from tests.conftest import Run
from tests.files.making import HASH

ADVICE = "higher --ratio, calibrate on data of the task itself, and with --gradients"


def held_out(losses: dict[tuple[str, float], float], *, error: float, chosen: int | None = None) -> HeldOut:
    """Measured on 50 samples; every difference has the same standard error."""
    data = DataRecord(file="d.jsonl", hash=HASH, samples=50, tokens=999, max_length=64, seed=0)
    errors = {"standard_error": 0.5, "standard_error_to_none": error, "standard_error_to_corrected": error}
    candidates = [
        Candidate.model_validate({"adapter": adapter, "scale": scale, "loss": loss, **errors})
        for (adapter, scale), loss in losses.items()
    ]
    return HeldOut(data, candidates, chosen)


def compared(none: float, trained: float, corrected: float) -> dict[tuple[str, float], float]:
    return {("none", 0.0): none, ("trained", 1.0): trained, ("corrected", 1.0): corrected}


def test_a_lora_that_loses_against_none_is_warned_of_with_what_to_try() -> None:
    (warning,) = shown.warnings(held_out(compared(3.0, 3.4, 3.2), error=0.01))
    assert warning.startswith("the base is better without the corrected LoRA on these data (3.0000 against 3.2000, ")
    assert "difference 0.2000 ± 0.0100" in warning
    assert ADVICE in warning
    assert warning.endswith("or try --select")
    assert shown.warnings(held_out(compared(3.4, 3.3, 3.2), error=0.01)) == [], "the control: a LoRA that helps"


def test_a_loss_that_may_be_chance_says_how_many_samples_would_tell() -> None:
    (warning,) = shown.warnings(held_out(compared(3.0, 3.4, 3.1), error=0.2))
    assert warning.startswith("the base is better without the corrected LoRA")
    needed = math.ceil(50 * (0.2 / 0.1) ** 2)  # the error falls with the root of the number of samples
    assert warning.endswith(f"or it is chance, as samples are few: pass more than 50 samples, some {needed}")


def test_a_gain_that_may_be_chance_is_called_so() -> None:
    (warning,) = shown.warnings(held_out(compared(3.2, 3.4, 3.1), error=0.2))
    assert warning.startswith(
        "too few samples to tell whether the corrected LoRA helps the base (3.2000 against 3.1000"
    )
    assert "difference 0.1000 ± 0.2000" in warning
    assert warning.endswith("some 200")


def test_an_uncorrected_lora_that_is_clearly_better_points_to_the_choice() -> None:
    (warning,) = shown.warnings(held_out(compared(3.5, 3.0, 3.2), error=0.01))
    assert "the uncorrected LoRA is better than the corrected one" in warning
    assert warning.endswith("try --select")


@pytest.mark.parametrize(("error", "told"), [(0.05, True), (0.2, False)])
def test_a_choice_says_where_the_samples_are_too_few_to_tell_what_is_seen(error: float, told: bool) -> None:
    """A lower loss of the LoRA at scale 0.5, within the standard error or not."""
    losses = {**compared(4.0, 3.5, 3.2), ("corrected", 0.5): 3.1}
    warnings = shown.warnings(held_out(losses, error=error, chosen=3 if told else 2))
    if told:
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.startswith("too few samples to tell the corrected LoRA at scale 0.5 from the corrected one (3.1000")
    assert "difference 0.1000 ± 0.2000" in warning


@pytest.fixture(scope="module")
def easy_for_the_base(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that the base itself writes greedily, which it predicts better than with any random LoRA."""
    ids = torch.arange(4, 44)[:, None]
    with torch.no_grad():
        while ids.shape[1] < 16:
            ids = torch.cat([ids, run.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    path = tmp_path_factory.mktemp("easy") / "easy.safetensors"
    save_file({"0/input_ids": ids}, path)
    return path


def run_correct(invoke: Invoke, run: Run, *extra: object) -> Printed:
    folders = ("--emulator", run.emulator, "--adapter", run.adapter, "--base", run.base)
    return invoke("correct", *folders, *extra, columns=110)


def test_where_no_lora_wins_the_table_is_shown_and_the_status_is_1(
    run: Run, invoke: Invoke, easy_for_the_base: Path, tmp_path: Path
) -> None:
    printed = run_correct(invoke, run, "--data", easy_for_the_base, "--select", "--output", "out")
    assert printed.status == 1
    assert not (tmp_path / "out").exists()
    assert printed.stdout.startswith("Nothing was written")
    assert re.search(r"^none .* chosen$", printed.stdout, re.MULTILINE)
    assert "no LoRA was written: on these data the base is better without any" in printed.error
    assert ADVICE in printed.error
    dry = run_correct(invoke, run, "--data", easy_for_the_base, "--select", "--dry-run")
    assert (dry.status, dry.error) == (1, printed.error)
    plain = run_correct(invoke, run, "--data", easy_for_the_base, "--output", "out")  # the control: only compared
    assert plain.status == 0
    assert "Warning: the base is better without the corrected LoRA" in plain.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_json_holds_the_table_also_where_nothing_was_written(
    run: Run, invoke: Invoke, easy_for_the_base: Path, tmp_path: Path
) -> None:
    printed = run_correct(invoke, run, "--data", easy_for_the_base, "--select", "--output", "out", "--json")
    value: Any = json.loads(printed.stdout)
    assert printed.status == 1
    assert value["output"] is None
    result = correct(
        emulator=run.emulator,
        adapter=run.adapter,
        base=str(run.base),
        output=None,
        data=easy_for_the_base,
        select=True,
    )
    assert result.heldout is not None
    assert value["heldout"] == {
        "data": result.heldout.data.model_dump(),
        "candidates": [each.model_dump() for each in result.heldout.candidates],
        "chosen": 0,
        "predicts": "tokens",
    }


def test_the_table_shows_the_losses_and_what_was_stored(run: Run, invoke: Invoke, tmp_path: Path) -> None:
    data = pico.save_texts(tmp_path / "data.jsonl", count=6, seed=5)
    printed = run_correct(invoke, run, "--data", data, "--dry-run", "--select", "--json")
    value = json.loads(printed.stdout)["heldout"]
    text = run_correct(invoke, run, "--data", data, "--dry-run", "--select").stdout
    rows = text.partition("± standard error")[2].splitlines()[2:13]
    for place, (row, each) in enumerate(zip(rows, value["candidates"], strict=True)):
        name = {"trained": "uncorrected"}.get(each["adapter"], each["adapter"])
        assert row.startswith(name)
        assert f" {each['loss']:.4f} ± {each['standard_error']:.4f}" in row
        assert row.endswith(" chosen") == (place == value["chosen"])
        if name != "none":
            assert row.split()[1] == f"{each['scale']:g}"
            difference = each["loss"] - value["candidates"][0]["loss"]
            assert f" {difference:+.4f} ± {each['standard_error_to_none']:.4f}" in row


@pytest.mark.parametrize("option", [["--select"], ["--samples", "4"], ["--dtype", "float32"], ["--seed", "0"]])
def test_options_of_the_data_without_data_are_a_usage_error(run: Run, invoke: Invoke, option: list[str]) -> None:
    printed = run_correct(invoke, run, *option, "--dry-run")
    assert printed.status == 2
    assert f"Option '{option[0]}' needs '--data'" in printed.stderr
    assert run_correct(invoke, run, "--dry-run").status == 0


def test_help_says_that_nothing_can_check_what_the_lora_was_trained_on(invoke: Invoke) -> None:
    text = " ".join(invoke("correct", "--help").stdout.split())
    assert "must not have been trained on them, which nothing can check" in text
