"""calibrate --gradients: what the folder holds of the loss gradient is what autograd gives on the model in memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_tools.errors import InputError, NumericalError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.linalg import cross_entropy
from emloc_tools.stages import calibrate as stage
from emloc_tools.stages.calibrate import CalibrationResult, calibrate
from emloc_tools.streaming.backward import BackwardLockStep
from tests import pico
from tests.stages.conftest import EXCLUDED, MAX_LENGTH, Case
from tests.stages.loss_reference import (
    GradientMoments,
    data_part,
    gradient_moments,
    next_token_loss,
    read_gradients,
)
from tests.stages.reference import close_to, linears, read_json

TEXT_FAMILIES = ["llama", "qwen3", "gpt2", "gemma3", "qwen3-moe"]
ROUNDING = 5e-5  # of a float32 forward and backward against float64, relative to the Gram's norm


def with_gradients(case: Case, data: Path, output: Path, **options: Any) -> CalibrationResult:
    options = {"max_length": MAX_LENGTH, "device": "cpu", "gradients": True, **options}
    return calibrate(base=str(case.base), data=data, output=output, **options)


def assert_moments(folder: Path, expected: dict[str, GradientMoments]) -> None:
    """All layers, with the stated sides, tokens, energies and values."""
    found = read_gradients(folder)
    assert found.keys() == expected.keys()
    for name, (side, tokens, energy, G) in found.items():
        assert tokens == expected[name].tokens
        assert energy == pytest.approx(expected[name].energy, rel=ROUNDING)
        assert close_to(G, expected[name].of(side)) < ROUNDING


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_gradients_of_texts_are_those_of_the_model_in_memory(
    weighted_case_of: Callable[[str], Case], family: str
) -> None:
    case = weighted_case_of(family)
    samples = pico.token_ids(case.data, case.base, MAX_LENGTH)
    assert_moments(case.calibration, gradient_moments(case.model, [next_token_loss((ids, 0)) for ids in samples]))
    manifest = read_json(case.calibration / "calibration.json")
    assert (manifest["format_version"], manifest["loss"]) == (2, "next-token")
    assert case.result.gradients == len(linears(case.model))


def test_a_loss_in_many_chunks_has_the_same_gradients(
    llama: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS_PER_SOFTMAX", 3)
    with_gradients(llama, llama.data, tmp_path / "calibration", batch_size=2)
    samples = pico.token_ids(llama.data, llama.base, MAX_LENGTH)
    assert min(len(ids) for ids in samples) > 2 * 3, "several chunks"
    expected = gradient_moments(llama.model, [next_token_loss((ids, 0)) for ids in samples])
    assert_moments(tmp_path / "calibration", expected)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_side_has_the_fewer_features(weighted_case_of: Callable[[str], Case], family: str) -> None:
    case = weighted_case_of(family)
    sides = {name: side for name, (side, *_) in read_gradients(case.calibration).items()}
    shapes = {name: module.weight.shape for name, module in linears(case.model).items()}
    if family == "gpt2":
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    wide = {name for name, (out, features) in shapes.items() if out > features}
    assert {name for name, side in sides.items() if side == "input_gradient"} == wide
    assert wide or family == "qwen3-moe"


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_data_s_grams_are_those_of_a_calibration_without_gradients(
    case_of: Callable[[str], Case], weighted_case_of: Callable[[str], Case], family: str
) -> None:
    plain, found = data_part(case_of(family).calibration), data_part(weighted_case_of(family).calibration)
    assert found.keys() == plain.keys()
    for layers, (side, tokens, values) in found.items():
        assert (side, tokens) == plain[layers][:2]
        assert torch.equal(values, plain[layers][2])
    assert case_of(family).result.grams == weighted_case_of(family).result.grams
    assert case_of(family).result.gradients == 0


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_weight_is_read_twice_at_most(weighted_case_of: Callable[[str], Case], family: str) -> None:
    case = weighted_case_of(family)
    stored = sum(tensor.nbytes for path in case.base.glob("*.safetensors") for tensor in load_file(path).values())
    assert stored < case.result.bytes_read <= 2 * stored


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_padding_leaves_no_trace_in_larger_batches(
    weighted_case_of: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    case = weighted_case_of(family)
    with_gradients(case, case.data, tmp_path / "batched", batch_size=3, exclude=EXCLUDED.get(family))
    alone = read_gradients(case.calibration)
    for name, (side, tokens, energy, G) in read_gradients(tmp_path / "batched").items():
        assert (side, tokens) == alone[name][:2]
        assert energy == pytest.approx(alone[name][2], rel=ROUNDING)
        assert close_to(G, alone[name][3]) < ROUNDING


@pytest.mark.parametrize("batch_size", [1, 3])
def test_of_prompt_and_completion_only_the_completion_is_a_target(llama: Case, tmp_path: Path, batch_size: int) -> None:
    pairs = [("what is it? ", "a cat"), ("and this, over there? ", "some dogs"), ("who ", "nobody at all")]
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    data = pico.write_jsonl(tmp_path / "pairs.jsonl", records)
    with_gradients(llama, data, tmp_path / "calibration", batch_size=batch_size)
    texts = pico.write_jsonl(tmp_path / "texts.jsonl", [{"text": prompt + completion} for prompt, completion in pairs])
    whole = pico.token_ids(texts, llama.base, MAX_LENGTH)
    # One token per byte, so the prompt's tokens are a prefix of the whole.
    samples = [(ids, len(prompt)) for ids, (prompt, _) in zip(whole, pairs, strict=True)]
    expected = gradient_moments(llama.model, [next_token_loss(sample) for sample in samples])
    assert_moments(tmp_path / "calibration", expected)
    all_targets = gradient_moments(llama.model, [next_token_loss((ids, 0)) for ids in whole])
    assert all(close_to(expected[name].inside, all_targets[name].inside) > 0.01 for name in expected), "the control"


def bert_inputs(path: Path) -> dict[str, torch.Tensor]:
    """One padded batch with labels at some real tokens."""
    ids = torch.randint(4, pico.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = torch.where(torch.rand(2, 12, generator=torch.Generator().manual_seed(4)) < 0.5, ids, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    save_file({f"0/{name}": tensor for name, tensor in inputs.items()}, path)
    return inputs


def test_ready_inputs_with_labels_have_the_model_s_own_loss(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    bert = case_of("bert")
    inputs = bert_inputs(tmp_path / "in.safetensors")
    with_gradients(bert, tmp_path / "in.safetensors", tmp_path / "calibration")
    expected = gradient_moments(bert.model, [lambda model: model(**inputs).loss], inputs["attention_mask"].bool())
    assert_moments(tmp_path / "calibration", expected)
    assert {seen.tokens for seen in expected.values()} == {20}
    assert read_json(tmp_path / "calibration" / "calibration.json")["loss"] == "model"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_labels_do_not_change_the_data_s_grams(case_of: Callable[[str], Case], family: str, tmp_path: Path) -> None:
    inputs = bert_inputs(tmp_path / "labelled.safetensors")
    plain = {f"0/{name}": tensor for name, tensor in inputs.items() if name != "labels"}
    save_file(plain, tmp_path / "plain.safetensors")
    for name, gradients in (("labelled", True), ("labelled", False), ("plain", False)):
        output = tmp_path / f"{name} {gradients}"
        with_gradients(case_of(family), tmp_path / f"{name}.safetensors", output, gradients=gradients)
    first, *others = (data_part(tmp_path / name) for name in ("plain False", "labelled False", "labelled True"))
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[layers][2], first[layers][2]) for layers in first)


def test_a_model_without_a_loss_on_texts_is_refused(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    bert = case_of("bert")
    with pytest.raises(UnsupportedError, match=r"BertForMaskedLM does not predict the next token.*with labels"):
        with_gradients(bert, bert.data, tmp_path / "calibration")
    assert list(tmp_path.iterdir()) == []


def test_ready_inputs_without_labels_are_refused(llama: Case, tmp_path: Path) -> None:
    save_file({"0/input_ids": torch.tensor([[5, 6, 7]])}, tmp_path / "in.safetensors")
    with pytest.raises(InputError, match=r"hold neither labels \(<n>/labels\) nor what .* in every batch"):
        with_gradients(llama, tmp_path / "in.safetensors", tmp_path / "calibration")


def test_samples_without_a_token_to_predict_are_refused(llama: Case, tmp_path: Path) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a" * 50, "completion": "b"}])
    with pytest.raises(InputError, match="no sample holds a token to predict; are completions beyond --max-length"):
        with_gradients(llama, data, tmp_path / "calibration", max_length=20)
    with_gradients(llama, data, tmp_path / "calibration", max_length=51)  # the control


def test_labels_that_are_all_ignored_are_refused(llama: Case, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    save_file({"0/input_ids": ids, "0/labels": torch.full_like(ids, -100)}, tmp_path / "in.safetensors")
    with pytest.raises(NumericalError, match=r"LlamaForCausalLM returns the loss nan for ready inputs; labels"):
        with_gradients(llama, tmp_path / "in.safetensors", tmp_path / "calibration")
    assert not (tmp_path / "calibration").exists()


def test_gradients_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    model = pico.save_model(tmp_path / "base")
    weights = model.state_dict()
    weights["lm_head.weight"] *= 1e25  # logits are finite; squares of their gradient are not
    model.save_pretrained(tmp_path / "base")
    data = pico.save_texts(tmp_path / "train.jsonl", count=1)
    with pytest.raises(NumericalError, match=r"the gradients of layer model\.layers\.2\..* hold NaN or infinity"):
        calibrate(base=str(tmp_path / "base"), data=data, output=tmp_path / "c", device="cpu", gradients=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("title", ["calibrate", "gradients"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(llama: Case, tmp_path: Path, error: type[BaseException], title: str) -> None:
    def stop(step: Any) -> None:
        if step.title == title:
            raise error("stop")

    with pytest.raises(error):
        with_gradients(llama, llama.data, tmp_path / "calibration", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_for_the_activations_is_refused_before_a_weight_is_read(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = sum(len(ids) for ids in pico.token_ids(llama.data, llama.base, MAX_LENGTH))
    config = llama.model.config
    units = config.num_hidden_layers + 3  # with embeddings, last norm and head
    needed = tokens * config.hidden_size * 4 * (units + 2)
    free, read = needed - 1, []
    original = TensorFolder.read

    def counted(self: TensorFolder, name: str, *rest: Any) -> torch.Tensor:
        read.append(name)
        return original(self, name, *rest)

    monkeypatch.setattr(TensorFolder, "read", counted)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    numbers = rf"about {math.ceil(needed / 1e6)} MB beside .*/calibration .* {free // 10**6} MB are free there"
    with pytest.raises(InputError, match=rf"{numbers}; choose fewer --samples, a shorter --max-length, or an --output"):
        with_gradients(llama, llama.data, tmp_path / "calibration")
    assert (read, list(tmp_path.iterdir())) == ([], [])
    with_gradients(llama, llama.data, tmp_path / "plain", gradients=False)  # the controls
    free = needed
    with_gradients(llama, llama.data, tmp_path / "calibration")
    assert read


def test_the_activations_on_disk_are_those_of_at_most_three_units_less_than_estimated(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates, streams = [], []
    monkeypatch.setattr(stage, "require_room", lambda folder, output, needed, fewer: estimates.append(needed))

    class Kept(BackwardLockStep):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            streams.append(self)

    monkeypatch.setattr(stage, "BackwardLockStep", Kept)
    with_gradients(llama, llama.data, tmp_path / "calibration", batch_size=1)
    tokens = sum(len(ids) for ids in pico.token_ids(llama.data, llama.base, MAX_LENGTH))
    one_unit = tokens * llama.model.config.hidden_size * 4
    assert estimates[0] - 3 * one_unit < streams[0].spilled <= estimates[0]


def test_nothing_is_left_of_the_activations_on_disk(llama: Case, tmp_path: Path) -> None:
    with_gradients(llama, llama.data, tmp_path / "calibration")
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["calibration", "calibration-00001-of-00001.safetensors", "calibration.json"]
