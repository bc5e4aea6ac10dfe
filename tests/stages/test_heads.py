"""A base with a fitted head goes through every later stage, its head frozen or trained along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F

from emloc_tools import load_emulator
from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import Evaluation, evaluate
from emloc_tools.stages.fit_head import fit_head
from emloc_tools.stages.merge import merge
from tests import pico
from tests.stages import classifiers
from tests.stages.adapters import on
from tests.stages.classifiers import labelled, logits_of
from tests.stages.loss_reference import Loss, gradient_moments, read_gradients
from tests.stages.reference import close_to, read_json, read_tensors

LENGTH = 48
FROZEN = {"exclude_modules": ["score", "classifier"], "task_type": None}  # the recipe of docs/heads.md


@dataclass(frozen=True)
class Task:
    """A base with a head, its data, its calibration with gradients, and its emulator."""

    headed: Path
    data: Path
    calibration: Path
    emulator: Path


@pytest.fixture(scope="module")
def task_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Task]:
    made: dict[str, Task] = {}

    def make(family: str) -> Task:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            task = Task(root / "headed", root / "labelled.jsonl", root / "calibration", root / "emulator")
            classifiers.save_base(root / "base", family)
            classifiers.save_labelled(task.data, 18)
            options: dict[str, Any] = {"data": task.data, "max_length": LENGTH, "device": "cpu"}
            fit_head(base=str(root / "base"), output=task.headed, weight_decay=0.02, held_out=0, **options)
            calibrate(base=str(task.headed), output=task.calibration, gradients=True, batch_size=3, **options)
            build_emulator(base=str(task.headed), calibration=task.calibration, ratio=0.5, output=task.emulator)
            made[family] = task
        return made[family]

    return make


@pytest.fixture(scope="module")
def task(task_of: Callable[[str], Task]) -> Task:
    return task_of("llama")


def headed_model(task: Task) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(task.headed).eval()


def plain_loop(model: Any, task: Task) -> tuple[float, float]:
    """Mean loss and accuracy, one sample at a time."""
    samples, y = labelled(task.data, task.headed, LENGTH)
    with torch.no_grad():
        logits = logits_of(model, samples).double()
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


def measured(task: Task, **options: Any) -> list[Evaluation]:
    return evaluate(**{"data": task.data, "max_length": LENGTH, "device": "cpu", "batch_size": 4, **options})


def save_lora(folder: Path, task: Task, **options: Any) -> Path:
    """A LoRA as if it were trained, and if the head is saved as a whole, a head that was changed."""
    pico.save_lora(folder, task.emulator, **options)
    return folder


def correct_for(task: Task, adapter: Path, output: Path, **options: Any) -> Any:
    return correct(emulator=task.emulator, adapter=adapter, base=str(task.headed), output=output, **options)


@pytest.mark.parametrize("family", ["llama", "bert-pooled"])
def test_loss_and_accuracy_are_those_of_a_plain_loop(
    family: str, task_of: Callable[[str], Task], tmp_path: Path
) -> None:
    task = task_of(family)
    lora = save_lora(tmp_path / "lora", task, **FROZEN)
    correct_for(task, lora, tmp_path / "corrected")
    found = measured(task, base=str(task.headed), emulator=task.emulator, adapters=[lora, tmp_path / "corrected"])
    expected = {
        ("base", None): plain_loop(headed_model(task), task),
        ("base", str(lora)): plain_loop(on(headed_model(task), lora), task),
        ("base", str(tmp_path / "corrected")): plain_loop(on(headed_model(task), tmp_path / "corrected"), task),
        ("emulator", None): plain_loop(load_emulator(task.emulator).eval(), task),
        ("emulator", str(lora)): plain_loop(on(load_emulator(task.emulator), lora), task),
    }
    assert [(result.model, result.adapter) for result in found] == list(expected)
    for result, (loss, accuracy) in zip(found, expected.values(), strict=True):
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert (result.accuracy, result.exact) == (pytest.approx(accuracy), pytest.approx(accuracy))
        assert (result.predicts, result.tokens, result.perplexity) == ("labels", 18, None)
    assert len({round(result.loss, 6) for result in found}) == len(found), "adapters must make a difference"


@pytest.mark.parametrize("family", ["llama", "bert-pooled"])
def test_gradients_are_those_of_the_loss_of_the_labels(family: str, task_of: Callable[[str], Task]) -> None:
    """Calibrated in batches of three, padded; here every sample runs by itself, in float64."""
    task = task_of(family)
    samples, y = labelled(task.data, task.headed, LENGTH)

    def loss_of(ids: list[int], label: torch.Tensor) -> Loss:
        return lambda model: F.cross_entropy(model(input_ids=torch.tensor([ids])).logits, label[None])

    expected = gradient_moments(headed_model(task), [loss_of(*pair) for pair in zip(samples, y, strict=True)])
    found = read_gradients(task.calibration)
    assert read_json(task.calibration / "calibration.json")["loss"] == "model"
    assert found.keys() == expected.keys()
    others = gradient_moments(headed_model(task), [loss_of(*pair) for pair in zip(samples, y.roll(1), strict=True)])
    for layer, (side, tokens, energy, G) in found.items():
        assert tokens == expected[layer].tokens
        assert close_to(G, expected[layer].of(side)) < 1e-4
        assert energy == pytest.approx(expected[layer].energy, rel=1e-4)
        assert close_to(G, others[layer].of(side)) > 1e-2, "the control: other labels"


def test_texts_without_labels_give_a_classifier_no_loss(task: Task, tmp_path: Path) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "some text"}, {"text": "and more"}])
    options: dict[str, Any] = {"base": str(task.headed), "data": data, "device": "cpu"}
    with pytest.raises(InputError, match="for a sequence classifier a label"):
        evaluate(**options)
    with pytest.raises(InputError, match="LlamaForSequenceClassification classifies texts, so every record needs a"):
        calibrate(**options, gradients=True, output=tmp_path / "calibration")
    calibrate(**options, output=tmp_path / "calibration")  # without gradients none is needed


def test_the_emulator_loads_as_a_classifier_by_its_own_code(task: Task) -> None:
    cls = transformers.AutoModelForSequenceClassification
    model, report = cls.from_pretrained(task.emulator, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "EmlocLlamaForSequenceClassification"
    assert report["missing_keys"] == set()
    samples, _ = labelled(task.data, task.headed, LENGTH)
    with torch.no_grad():
        own, ours, base = (
            logits_of(each, samples) for each in (model.eval(), load_emulator(task.emulator).eval(), headed_model(task))
        )
    assert torch.equal(own, ours)
    assert close_to(own, base) > 1e-3, "an emulator is not its base"
    assert torch.equal(model.score.weight, headed_model(task).score.weight)
    assert model.config.label2id == {"ham": 0, "neither": 1, "spam": 2}


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (FROZEN, []),
        ({"task_type": None}, ["score.lora_A.default.weight", "score.lora_B.default.weight"]),
        ({"task_type": "SEQ_CLS"}, ["score.modules_to_save.default.weight"]),
        ({"task_type": "SEQ_CLS", "exclude_modules": ["score"]}, ["score.modules_to_save.default.weight"]),
    ],
)
def test_what_peft_trains_of_the_head_is_what_the_page_says(
    task: Task, options: dict[str, Any], trained: list[str]
) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", **options)
    model = peft.get_peft_model(load_emulator(task.emulator), config)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "score" in name]
    assert [name.removeprefix("base_model.model.") for name in names] == trained


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_fit_head_lists_is_what_has_to_be_excluded(family: str, tmp_path: Path) -> None:
    classifiers.save_base(tmp_path / "base", family)
    data = classifiers.save_labelled(tmp_path / "data.jsonl", 6)
    fitted = fit_head(base=str(tmp_path / "base"), data=data, output=tmp_path / "out", weight_decay=1, device="cpu")
    excluded = sorted({name.rpartition(".")[0] for name in fitted.head})
    for options, frozen in (({"exclude_modules": excluded}, True), ({}, False)):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **options))
        trained = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
        assert trained
        assert any(module in name for name in trained for module in excluded) is not frozen


def test_a_frozen_head_stays_that_of_the_base_and_is_not_warned_of(task: Task, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", task, **FROZEN)
    result = correct_for(task, lora, tmp_path / "corrected")
    assert result.head == []
    assert not any("score" in name for name in read_tensors(tmp_path / "corrected"))
    assert read_json(tmp_path / "corrected" / "adapter_config.json")["auto_mapping"] == {
        "base_model_class": "LlamaForSequenceClassification",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    model = on(headed_model(task), tmp_path / "corrected")
    assert torch.equal(model.base_model.model.score.weight, headed_model(task).score.weight)


@pytest.mark.parametrize("kind", ["saved as a whole", "adapted"])
def test_a_head_trained_on_the_emulator_passes_through_and_is_named(task: Task, tmp_path: Path, kind: str) -> None:
    lora = save_lora(tmp_path / "lora", task, task_type="SEQ_CLS" if kind == "saved as a whole" else None)
    result = correct_for(task, lora, tmp_path / "corrected")
    assert result.head == ["score"]
    before, after = read_tensors(lora), read_tensors(tmp_path / "corrected")
    of_head = [name for name in before if "score" in name]
    assert of_head
    assert all(torch.equal(before[name], after[name]) for name in of_head)
    assert not all(torch.equal(before[name], after[name]) for name in before), "the other pairs are corrected"


def test_a_head_saved_with_the_lora_is_measured_once_it_is_merged(task: Task, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", task, task_type="SEQ_CLS")
    tensors = read_tensors(lora)
    name = "base_model.model.score.weight"
    changed = {**tensors, name: torch.randn_like(tensors[name])}
    save_file(changed, lora / "adapter_model.safetensors", metadata={"format": "pt"})
    correct_for(task, lora, tmp_path / "corrected")
    with pytest.raises(UnsupportedError, match=r"holds base_model\.model\.score\.weight beside LoRA pairs"):
        measured(task, base=str(task.headed), adapters=[tmp_path / "corrected"])
    merge(base=str(task.headed), adapter=tmp_path / "corrected", output=tmp_path / "merged")
    (result,) = measured(task, base=str(tmp_path / "merged"))
    loss, accuracy = plain_loop(on(headed_model(task), tmp_path / "corrected"), task)
    assert (result.loss, result.accuracy) == (pytest.approx(loss, rel=1e-4), pytest.approx(accuracy))
    assert abs(loss - plain_loop(headed_model(task), task)[0]) > 1e-2


def test_correct_measures_and_chooses_by_labels(task: Task, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", task, **FROZEN)
    options: dict[str, Any] = {"data": task.data, "max_length": LENGTH}
    result = correct_for(task, lora, tmp_path / "corrected", **options)
    assert result.heldout is not None
    assert (result.heldout.data.samples, result.heldout.data.tokens) == (18, 18)
    found = measured(task, base=str(task.headed), adapters=[lora, tmp_path / "corrected"])
    expected = dict(zip(("none", "trained", "corrected"), (each.loss for each in found), strict=True))
    assert {each.adapter: pytest.approx(each.loss, rel=1e-5) for each in result.heldout.candidates} == expected
    chosen = correct_for(task, lora, tmp_path / "chosen", select=True, **options)
    assert chosen.heldout is not None
    assert chosen.heldout.chosen is not None


@pytest.mark.parametrize(
    ("labels", "fits"),
    [
        (torch.tensor([2, 0]), True),
        (torch.tensor([3, 0]), False),
        (torch.tensor([1.0, 0.0]), False),
        (torch.tensor([1]), False),
        (torch.tensor([[1, 0, 2], [1, 2, 0]]), False),
    ],
)
def test_ready_inputs_need_one_label_for_each_sample(
    task: Task, tmp_path: Path, labels: torch.Tensor, fits: bool
) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    save_file({"0/input_ids": ids, "0/labels": labels}, tmp_path / "in.safetensors")
    if not fits:
        with pytest.raises(InputError, match=r"do not fit the model's output|this model predicts no tokens"):
            evaluate(base=str(task.headed), data=tmp_path / "in.safetensors", device="cpu")
        return
    (result,) = evaluate(base=str(task.headed), data=tmp_path / "in.safetensors", device="cpu")
    with torch.no_grad():
        logits = logits_of(headed_model(task), ids.tolist())
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.tokens == 2
