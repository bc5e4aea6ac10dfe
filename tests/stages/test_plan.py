"""Plans: the largest emulator that fits, what is written of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools import load_emulator
from emloc_tools.errors import InputError
from emloc_tools.files.plan import PlanV1, read_plan
from emloc_tools.models.source import Source
from emloc_tools.records import Step
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.plan import plan, planned_build
from tests import pico
from tests.planning.measured import peak_of_training

STEP: dict[str, Any] = {"sequence_length": 64, "lora_rank": 4, "reserve": 0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEMORY = 335_000  # bytes: less than the base needs, and more than the smallest emulator does


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block."""
    folder = tmp_path_factory.mktemp("plan") / "base"
    config = pico.config("llama")
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    pico.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def planned(base: Path) -> tuple[PlanV1, Path, list[str]]:
    """A plan, its file, and the steps that it simulated."""
    file = base.parent / "plan.json"
    told: list[Step] = []
    found = plan(base=str(base), memory=MEMORY, save=file, progress=told.append, **STEP)
    return found, file, [step.detail for step in told]


def real_peak(folder: Path) -> int:
    """Of a training step on an emulator, but for the generator's state that the block's checkpoint keeps."""
    ids = torch.randint(3, pico.VOCABULARY, (1, 64))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return peak_of_training(load_emulator(folder), given, targets=TARGETS) - torch.get_rng_state().nbytes


def test_the_planned_emulator_fits_and_the_next_larger_one_does_not(
    planned: tuple[PlanV1, Path, list[str]], tmp_path: Path
) -> None:
    found, file, _ = planned
    assert found.emulator is not None
    chosen = planned_build(file)
    built = build_emulator(base=chosen.base, ratio=chosen.ratio, output=tmp_path / "planned")
    build_emulator(base=chosen.base, ratio=chosen.ratio + 0.001, output=tmp_path / "larger")
    assert real_peak(tmp_path / "planned") == pytest.approx(found.emulator.training.total, rel=1e-3)
    assert found.emulator.training.total <= MEMORY < real_peak(tmp_path / "larger")
    assert built.manifest.parameters == found.emulator.parameters
    guard = 4  # bytes of the one value more that every emulator stores
    assert built.nbytes == found.emulator.size + guard
    assert len(built.manifest.layers) == found.factored_layers


def test_few_emulators_are_simulated(planned: tuple[PlanV1, Path, list[str]]) -> None:
    _, _, steps = planned
    assert steps[:2] == ["training on the base", "inference with the base"]
    assert len([step for step in steps if step.startswith("training at ratio")]) <= 3


def test_a_saved_plan_is_the_plan(planned: tuple[PlanV1, Path, list[str]]) -> None:
    found, file, _ = planned
    assert read_plan(file) == found


def test_a_calibration_takes_the_disk_that_is_foreseen(
    planned: tuple[PlanV1, Path, list[str]], base: Path, tmp_path: Path
) -> None:
    foreseen = next(stage.disk for stage in planned[0].stages if stage.stage == "calibrate --gradients")
    data = pico.save_texts(tmp_path / "train.jsonl", 2)
    found = calibrate(base=str(base), data=data, output=tmp_path / "out", gradients=True, device="cpu", max_length=16)
    assert foreseen == found.gram_bytes


def test_a_base_that_fits_needs_no_emulator(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    found = plan(base=str(base), memory=10**9, save=file, **STEP)
    assert (found.ratio, found.emulator, found.factored_layers) == (None, None, 0)
    with pytest.raises(
        InputError, match=r"plans no emulator, as training the base .* itself fits into 1,000,000,000 bytes"
    ):
        planned_build(file)


def test_too_little_memory_is_refused_with_what_it_would_take(base: Path) -> None:
    with pytest.raises(InputError, match=r"of rank 1 everywhere it would need [\d,]+ .* choose a smaller --batch-size"):
        plan(base=str(base), memory=100_000, **STEP)


def test_an_existing_file_is_not_replaced_unasked(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"plan.json exists; choose another --save"):
        plan(base=str(base), memory=10**9, save=file, **STEP)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_a_reserve_of_everything_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match="--reserve 5 leaves nothing of --memory 5"):
        plan(base=str(base), memory=5, reserve=5)


def test_of_the_hub_no_weights_are_fetched(
    planned: tuple[PlanV1, Path, list[str]], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan as of the folder, from the small files alone."""
    for path in base.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    asked: list[str] = []
    monkeypatch.setattr("emloc_tools.planning.subject.open_source", lambda base, **_: Source(base, "0" * 40, tmp_path))
    monkeypatch.setattr(Source, "locate", lambda self, name: asked.append(name))
    found = plan(base="org/name", memory=MEMORY, **STEP)
    assert asked == []
    assert found.base.revision == "0" * 40
    ignored = {"base", "made_by"}
    assert found.model_dump(exclude=ignored) == planned[0].model_dump(exclude=ignored)
