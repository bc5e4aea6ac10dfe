"""Losses of many runs: the model is read as often as the result says, and no more often than the runs need."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools.files.tensors import TensorFolder
from emloc_tools.stages import evaluate as stage
from emloc_tools.stages import scoring
from emloc_tools.stages.scoring import Scores
from tests import pico
from tests.conftest import Run

SAMPLES, LENGTH = 6, 10  # every sample is a batch of its own


@pytest.mark.parametrize("in_flight", [1, LENGTH, 4 * LENGTH, SAMPLES * 3 * LENGTH])
def test_every_pass_reads_every_weight_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: int
) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": letter * 2 * LENGTH} for letter in "abcdef"])
    stored, reads, found = set(run.model.state_dict()), Counter[str](), list[Scores]()
    original = TensorFolder.read

    def counted(self: TensorFolder, name: str, *rest: Any) -> torch.Tensor:
        if name in stored:
            reads[name] += 1
        return original(self, name, *rest)

    def kept(*args: Any, **options: Any) -> list[Scores]:
        found.extend(scoring.score(*args, **options))
        return found

    monkeypatch.setattr(scoring, "TOKENS_IN_FLIGHT", in_flight)
    monkeypatch.setattr(TensorFolder, "read", counted)
    monkeypatch.setattr(stage, "score", kept)
    adapters = [run.adapter, run.corrected]
    stage.evaluate(base=str(run.base), adapters=adapters, data=data, max_length=LENGTH, device="cpu")
    runs_at_once = max(1, in_flight // LENGTH)
    passes = math.ceil(SAMPLES * (len(adapters) + 1) / runs_at_once)
    assert [scores.passes for scores in found] == [passes] * (len(adapters) + 1)
    assert reads == dict.fromkeys(stored, passes)
