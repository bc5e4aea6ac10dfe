"""fit-head: the head is the optimum on what the base gives, found independently, and stock transformers loads it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from emloc_tools.files.tensors import TensorFolder
from emloc_tools.stages import scoring
from emloc_tools.stages.fit_head import FittedHead, fit_head
from emloc_tools.stages.head_fitting import DECAYS
from tests import pico
from tests.stages import classifiers
from tests.stages.classifiers import classifier, labelled, logits_of
from tests.stages.reference import close_to, read_tensors

DECAY, LENGTH = 0.02, 40
Fitted = Callable[..., tuple[Path, Path, FittedHead]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifiers.save_labelled(tmp_path_factory.mktemp("data") / "labelled.jsonl")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Fitted:
    """The base of a family, the folder with its head, and the result; made once for the same options."""
    made: dict[str, tuple[Path, Path, FittedHead]] = {}

    def make(family: str, **options: Any) -> tuple[Path, Path, FittedHead]:
        key = f"{family} {options}"
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            classifiers.save_base(root / "base", family)
            settings = {"max_length": LENGTH, "batch_size": 5, "held_out": 0, "weight_decay": DECAY, "device": "cpu"}
            result = fit_head(base=str(root / "base"), data=data, output=root / "out", **{**settings, **options})
            made[key] = root / "base", root / "out", result
        return made[key]

    return make


def head_of(folder: Path, result: FittedHead) -> dict[str, torch.Tensor]:
    tensors = read_tensors(folder)
    return {name: tensors[name].double() for name in result.head}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-pooled"])
def test_the_head_is_the_optimum_on_rows_of_the_base_without_padding(family: str, fitted: Fitted, data: Path) -> None:
    base, folder, result = fitted(family)
    samples, y = labelled(data, base, LENGTH)
    assert len({len(ids) for ids in samples[:5]}) > 1, "the first batch is padded"
    encoder = family == "bert-pooled"
    X = classifiers.pooled_rows(base, samples) if encoder else classifiers.last_rows(base, samples)
    W, b = classifiers.optimum(X, y, DECAY, bias=encoder)
    head = head_of(folder, result)
    weight = head["classifier.weight" if encoder else "score.weight"]
    assert set(head) == ({"classifier.weight", "classifier.bias"} if encoder else {"score.weight"})
    assert close_to(weight, W) < 1e-4
    if encoder:
        assert float((head["classifier.bias"] - head["classifier.bias"].mean() - b).norm()) < 1e-4
    least = float(F.cross_entropy(X @ W.T + b, y) + DECAY / 2 * W.square().sum())
    assert result.minimum.value == pytest.approx(least, rel=1e-7)
    assert result.minimum.converged
    first_rows = X if encoder else torch.stack([X[place - 1] for place in range(len(X))])
    assert close_to(weight, classifiers.optimum(first_rows, (y + 1) % 3, DECAY, bias=encoder)[0]) > 0.1  # the control


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("roberta", {"classifier.dense", "classifier.out_proj"}),
        ("bert", {"bert.pooler.dense", "classifier"}),
        ("modernbert-mean", {"classifier"}),  # the mean over tokens comes before what is missing
    ],
)
def test_all_that_the_checkpoint_lacks_is_at_rest(family: str, names: set[str], fitted: Fitted, data: Path) -> None:
    base, folder, result = fitted(family)
    assert {name.rpartition(".")[0] for name in result.head} == names
    samples, y = labelled(data, base, LENGTH)
    model = classifier(folder)

    def gradient() -> float:
        model.zero_grad()
        matrices = [model.get_parameter(name) for name in result.head if name.endswith("weight")]
        loss = F.cross_entropy(logits_of(model, samples), y) + DECAY / 2 * sum(m.square().sum() for m in matrices)
        loss.backward()
        found.append(loss.item())
        return max(float(model.get_parameter(name).grad.abs().max()) for name in result.head)

    found: list[float] = []
    assert gradient() < 1e-5  # what is stored is rounded to float32
    assert found[0] == pytest.approx(result.minimum.value, rel=1e-6)
    for name in result.head:
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        assert gradient() > 1e-4, f"{name} would not matter"
        with torch.no_grad():
            model.get_parameter(name).div_(1.5)


def test_losses_are_those_of_the_stored_model_and_a_random_head_is_worse(fitted: Fitted, data: Path) -> None:
    base, folder, result = fitted("llama", held_out=0.4)
    assert result.before is not None
    assert result.after is not None
    per_label = 36 // 3
    assert (result.fitted.samples, result.after.samples) == (3 * (per_label - 4), 3 * 4)  # 0.4 · 12, rounded down
    samples, y = labelled(data, base, LENGTH)
    with torch.no_grad():
        logits = logits_of(classifier(folder), samples)
    losses, right = F.cross_entropy(logits, y, reduction="none"), (logits.argmax(1) == y).double()
    parts = (result.fitted, result.after)
    assert sum(part.loss * part.samples for part in parts) == pytest.approx(float(losses.sum()), rel=1e-4)
    assert sum(part.accuracy * part.samples for part in parts) == pytest.approx(float(right.sum()))
    assert result.usual == pytest.approx(1 / 3)
    assert result.fitted.loss < result.before.loss / 2, "the control: a head before the fit"


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama-tied", ["score"]),
        ("gemma3", ["score"]),
        ("qwen3-moe", ["score"]),
        ("distilbert", ["pre_classifier", "classifier"]),  # with code of the model's own between them
        ("deberta", ["pooler.dense", "classifier"]),
    ],
)
def test_what_is_reported_of_padded_batches_is_true_of_the_stored_model(
    family: str, layers: list[str], fitted: Fitted, data: Path
) -> None:
    base, folder, result = fitted(family, weight_decay=0.05)
    assert list(dict.fromkeys(name.rpartition(".")[0] for name in result.head)) == layers
    samples, y = labelled(data, base, LENGTH)
    with torch.no_grad():
        logits = logits_of(classifier(folder), samples)
    assert result.fitted.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert result.fitted.loss < math.log(3), "chance"


def test_a_pass_reads_every_weight_of_the_body_once_and_the_old_head_never(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifiers.save_base(tmp_path / "base", "llama")
    reads: Counter[str] = Counter()
    original = TensorFolder.read

    def counted(self: TensorFolder, name: str, *rest: Any) -> torch.Tensor:
        reads[name] += 1
        return original(self, name, *rest)

    monkeypatch.setattr(TensorFolder, "read", counted)
    options: dict[str, Any] = {
        "base": str(tmp_path / "base"),
        "data": data,
        "device": "cpu",
        "max_length": 8,
        "weight_decay": 1,
    }
    fit_head(**options, output=tmp_path / "once")
    body = {name for name in read_tensors(tmp_path / "base") if name != "lm_head.weight"}
    assert reads == dict.fromkeys(body, 1)
    monkeypatch.setattr(scoring, "TOKENS_IN_FLIGHT", 36 * 8 // 3)
    fit_head(**options, output=tmp_path / "in-waves")
    assert reads == dict.fromkeys(body, 1 + 3)


def test_another_text_changes_the_head_unless_it_is_held_out(fitted: Fitted, tmp_path: Path) -> None:
    """Of 12 samples with 3 labels, a quarter of each is held out."""
    base, _, _ = fitted("llama")
    data = classifiers.save_labelled(tmp_path / "data.jsonl", 12)
    options: dict[str, Any] = {"base": str(base), "held_out": 0.25, "weight_decay": 0.1, "device": "cpu"}
    whole = fit_head(data=data, output=tmp_path / "whole", **options)
    lines, kept, same_quality = data.read_text().splitlines(), [], []
    for number, line in enumerate(lines):
        record = {**json.loads(line), "text": "another text altogether"}
        changed = [*lines[:number], json.dumps(record), *lines[number + 1 :]]
        (tmp_path / "changed.jsonl").write_text("\n".join(changed) + "\n")
        other = fit_head(data=tmp_path / "changed.jsonl", output=tmp_path / f"{number}", **options)
        kept.append(close_to(*(head_of(r.output, r)["score.weight"] for r in (other, whole))) < 1e-6)
        same_quality.append(other.after == whole.after)
    assert sum(kept) == 3
    assert [json.loads(line)["label"] for line, same in zip(lines, kept, strict=True) if same].count("ham") == 1
    assert not any(same_quality), "a changed head, or a changed text, is measured"


def test_the_head_depends_neither_on_batches_nor_on_the_number_of_passes(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = [head_of(*fitted("gpt2", batch_size=size)[1:])["score.weight"] for size in (1, 5, 36)]
    monkeypatch.setattr(scoring, "TOKENS_IN_FLIGHT", 100)
    heads.append(head_of(*fitted("gpt2", batch_size=4)[1:])["score.weight"])
    assert all(close_to(head, heads[0]) < 1e-4 for head in heads[1:])


def test_float32_gives_nearly_the_same_head_and_more_decay_another(fitted: Fitted) -> None:
    exact, single, shrunk = (
        head_of(*fitted("llama", **options)[1:])["score.weight"]
        for options in ({}, {"fit_dtype": "float32"}, {"weight_decay": 10 * DECAY})
    )
    assert close_to(single, exact) < 1e-2
    assert shrunk.norm() < exact.norm() / 2


def test_the_decay_is_chosen_on_samples_that_a_fit_has_not_seen(fitted: Fitted, tmp_path: Path) -> None:
    """Labels that have nothing to do with their texts can be learnt by heart, but others are then told worse than
    blindly. Such labels want a stronger decay than those which the texts themselves say.
    """
    base, _, given = fitted("llama")
    assert (given.weight_decay, given.tried) == (DECAY, {})
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name in ("noise", "told"):
        labels = torch.randint(2, (40,), generator=generator).tolist()
        texts = [
            f"{'no' if label or name == 'noise' else 'yes'} {number * 7919 % 1000}"
            for number, label in enumerate(labels)
        ]
        data = pico.write_jsonl(tmp_path / name, [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)])
        found[name] = fit_head(base=str(base), data=data, output=tmp_path / f"{name}-out", held_out=0, device="cpu")
    blind = math.log(2)
    for result in found.values():
        assert result.weight_decay == min(result.tried, key=result.tried.__getitem__)
    assert found["noise"].weight_decay > found["told"].weight_decay
    assert found["noise"].tried[min(DECAYS)] > blind
    by_heart = {"output": tmp_path / "by-heart", "weight_decay": min(DECAYS), "held_out": 0, "device": "cpu"}
    known = fit_head(base=str(base), data=tmp_path / "noise", **by_heart)
    assert known.fitted.loss < blind / 2, "the control: measured on the samples of the fit it would look good"
    assert found["told"].tried[found["told"].weight_decay] < blind / 2
