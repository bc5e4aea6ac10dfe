"""Losses from the files that hold them: each row is what the file says, under a name that says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emloc_tools.errors import InputError
from emloc_tools.files.manifest import Candidate, DataRecord, Selection
from emloc_tools.reporting import losses
from emloc_tools.reporting.tables import measured

RECORDED = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "demo.json"


def score(model: str, ratio: float | None, adapter: str, loss: float) -> dict[str, object]:
    """A row of the demo's results."""
    values = {"model": model, "ratio": ratio, "adapter": adapter, "loss": loss}
    return {**values, "perplexity": 1.0, "accuracy": loss / 10}


def test_the_demos_scores_get_their_roles(tmp_path: Path) -> None:
    scores = [
        score("base", None, "none", 5.0),
        score("base", None, "trained on the base", 3.0),
        score("base", 0.1, "uncorrected", 4.0),
        score("base", 0.1, "corrected", 3.5),
        score("emulator", 0.1, "none", 5.5),
        score("emulator", 0.1, "uncorrected", 3.9),
    ]
    (tmp_path / "results.json").write_text(json.dumps({"scores": scores, "seconds": 1.0}))
    found = losses.of_demo(tmp_path / "results.json")
    assert [(row.label, row.role, row.loss) for row in found.rows] == [
        ("base", "base", 5.0),
        ("base, LoRA trained on it", "upper bound", 3.0),
        ("base, LoRA from emulator 0.1, uncorrected", "uncorrected", 4.0),
        ("base, LoRA from emulator 0.1, corrected", "corrected", 3.5),
        ("emulator 0.1", "emulator", 5.5),
        ("emulator 0.1 with the LoRA trained on it", "emulator", 3.9),
    ]
    assert [row.accuracy for row in found.rows] == [entry["accuracy"] for entry in scores]


@pytest.mark.parametrize("damage", [{"scores": [{"model": "base"}]}, {}, {"scores": [score("x", None, "none", 1.0)]}])
def test_other_results_are_refused(damage: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(damage))
    with pytest.raises(InputError, match=r"results\.json is not what the demo writes: scores"):
        losses.of_demo(tmp_path / "results.json")


def test_an_evaluation_tells_corrected_loras_from_others() -> None:
    rows = [
        {"model": "base", "adapter": None, "corrected": False, "loss": 5.0, "accuracy": 0.1, "tokens": 7},
        {"model": "base", "adapter": "a", "corrected": False, "loss": 4.0, "accuracy": 0.2, "tokens": 7},
        {"model": "base", "adapter": "b", "corrected": True, "loss": 3.0, "accuracy": 0.3, "tokens": 7},
        {"model": "emulator", "adapter": "a", "corrected": False, "loss": 4.5, "accuracy": 0.15, "tokens": 7},
    ]
    found = losses.of_evaluation("e.json", {"results": rows})
    assert [(row.label, row.role) for row in found.rows] == [
        ("base", "base"),
        ("base, a", "uncorrected"),
        ("base, b", "corrected"),
        ("emulator, a", "emulator"),
    ]
    assert found.unit == "nats per token"
    assert losses.is_evaluation({"results": rows})
    assert not losses.is_evaluation({"results": []})
    assert not losses.is_evaluation({"results": [{**rows[0], "loss": "5.0"}]})


def test_a_denoisers_evaluation_has_errors_and_no_accuracy() -> None:
    row = {"model": "base", "adapter": None, "corrected": False, "loss": 0.5, "accuracy": None, "predicts": "entries"}
    found = losses.of_evaluation("e.json", {"results": [row]})
    assert (found.unit, found.rows[0].accuracy) == ("mean squared error", None)
    assert losses.of_evaluation("e.json", {"results": [{**row, "predicts": "labels"}]}).unit == "nats per label"
    (header, *_) = measured(found).columns[1:]
    assert header == "loss, mean squared error"


def test_a_selection_keeps_its_standard_errors_and_its_choice() -> None:
    data = DataRecord(file="h.jsonl", hash=f"xxh3_128:{'0' * 32}", samples=4, tokens=9, max_length=8, seed=0)
    candidates = [("none", 0.0, 5.0), ("trained", 1.0, 4.0), ("corrected", 1.0, 4.2), ("corrected", 0.5, 3.9)]
    selection = Selection(
        data=data,
        candidates=[
            Candidate(
                adapter=adapter, scale=scale, loss=loss, standard_error=loss / 100,
                standard_error_to_none=0.0, standard_error_to_corrected=0.0,
            )
            for adapter, scale, loss in candidates
        ],
        chosen=3,
    )  # fmt: skip
    found = losses.of_selection("corrected", selection)
    assert [(row.role, row.loss, row.standard_error) for row in found.rows] == [
        ("base", 5.0, 0.05),
        ("uncorrected", 4.0, 0.04),
        ("corrected", 4.2, 0.042),
        ("corrected", 3.9, 0.039),
    ]
    assert [row.chosen for row in found.rows] == [False, False, False, True]
    assert found.rows[3].label == "base, LoRA corrected, scale 0.5"
