"""demo: a real run, whose every figure can be had again from the files that it leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools import load_emulator
from emloc_tools.stages.demo import demo
from tests import pico
from tests.stages.adapters import on
from tests.stages.demo_commands import lines_of
from tests.stages.loss_reference import next_token_loss
from tests.stages.reference import read_json


def reference(model: Any, samples: list[list[int]]) -> tuple[float, float]:
    """Mean loss per predicted token, and the part of tokens predicted rightly, by a plain loop."""
    loss, right = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample])
        with torch.no_grad():
            loss += float(next_token_loss((sample, 0))(model))
            right += int((model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).sum())
    tokens = sum(len(sample) - 1 for sample in samples)
    return loss / tokens, right / tokens


def test_a_real_run_leaves_files_that_give_its_figures(tmp_path: Path) -> None:
    """Every loss again by PEFT from the adapters that it left, every parameter counted, every command in order."""
    pico.save_model(tmp_path / "base")
    data, out = pico.save_texts(tmp_path / "mine.jsonl", 20), tmp_path / "out"
    steps: list[Any] = []
    options: dict[str, Any] = {"ratios": [0.5], "steps": 2, "refinement": 2, "upper_bound": False}
    demo(output=out, base=str(tmp_path / "base"), data=data, progress=steps.append, **options)
    results = read_json(out / "results.json")
    samples = pico.token_ids(out / "data" / "heldout.jsonl", tmp_path / "base", pico.LLAMA["max_position_embeddings"])
    assert len(samples) == 2

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    emulator = out / "emulator-0.5"
    expected = {
        ("base", None, "none"): base(),
        ("base", 0.5, "uncorrected"): on(base(), out / "lora-0.5"),
        ("base", 0.5, "corrected"): on(base(), out / "corrected-0.5"),
        ("base", 0.5, "refined"): on(base(), out / "refined-0.5"),
        ("emulator", 0.5, "none"): load_emulator(emulator).eval(),
        ("emulator", 0.5, "uncorrected"): on(load_emulator(emulator), out / "lora-0.5"),
    }
    assert [(score["model"], score["ratio"], score["adapter"]) for score in results["scores"]] == list(expected)
    for score, model in zip(results["scores"], expected.values(), strict=True):
        loss, accuracy = reference(model, samples)
        assert score["loss"] == pytest.approx(loss, rel=1e-6)
        assert score["accuracy"] == pytest.approx(accuracy)
        assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    losses = [score["loss"] for score in results["scores"]]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-5 * losses[0]  # adapters act

    (training,) = results["trainings"]
    recorded = read_json(out / "lora-0.5" / "training.json")
    sizes = [weight.numel() for weight in load_emulator(emulator).parameters()]
    assert (training["parameters"], training["parameter_bytes"]) == (sum(sizes), 4 * sum(sizes))
    same = ("seconds", "peak_bytes", "idle_bytes", "first_loss", "last_loss")
    assert {key: training[key] for key in same} == {key: recorded[key] for key in same}
    assert recorded["steps"] == 2
    assert training["ratio"] == 0.5
    assert 0 < training["idle_bytes"] < training["peak_bytes"]
    assert training["seconds"] < results["seconds"]
    assert read_json(out / "calibration" / "calibration.json")["loss"] == "next-token"
    assert results["commands"] == lines_of(out / "commands.sh")[1:]
    assert [step.title for step in steps if step.done] == [
        "calibrate", "build 0.5", "train 0.5", "correct 0.5", "refine 0.5", "evaluate base", "evaluate 0.5",
    ]  # fmt: skip
    assert len(results["commands"]) == 7
    assert (results["output"], results["base"]) == (str(out), str(tmp_path / "base"))
