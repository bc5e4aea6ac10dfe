"""refine: the LoRA is where Adam on the model in memory would have taken it, and the base is better with it."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from emloc_tools.data.batches import Batch
from emloc_tools.errors import FormatError, InputError, MismatchError, NumericalError, UnsupportedError
from emloc_tools.models.weights import ModelWeights
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from emloc_tools.stages.fit_head import fit_head
from emloc_tools.stages.refine import RefinementResult, deal, refine
from tests import pico
from tests.stages import classifiers
from tests.stages.adapters import changed, on, pairs
from tests.stages.conftest import MAX_LENGTH, Case
from tests.stages.loss_reference import next_token_loss
from tests.stages.reference import bytes_hash, contents, read_json, read_tensors, write_json

STEPS, STEP_SIZE = 3, 0.1
# Of a float32 backward against float64, relative to the whole move: Adam divides small gradients by their own size.
ROUNDING = 2e-3

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "every layer": ("llama", {}),
    "rsLoRA and patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9}},
    ),
    "one block": ("llama", {"target_modules": r".*layers\.1\..*_proj"}),
    "the head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "the head of tied embeddings": ("llama-tied", {"target_modules": ["lm_head", "v_proj"]}),
    "Conv1D": ("gpt2", {"fan_in_fan_out": True}),
    "much between the blocks": ("gemma3", {}),
    "attention beside experts": ("qwen3-moe", {"target_modules": ["q_proj", "o_proj"]}),
}

Corrected = Callable[..., tuple[Case, Path]]


@pytest.fixture(scope="module")
def corrected(case_of: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Corrected:
    """A corrected LoRA with the given options for the base of a family; emulators are built once."""
    emulators: dict[str, Path] = {}

    def make(family: str = "llama", **options: Any) -> tuple[Case, Path]:
        case, folder = case_of(family), tmp_path_factory.mktemp("corrected")
        if family not in emulators:
            emulators[family] = tmp_path_factory.mktemp(family) / "emulator"
            build_emulator(base=str(case.base), calibration=case.calibration, ratio=0.5, output=emulators[family])
        pico.save_lora(folder / "lora", emulators[family], **options)
        correct(emulator=emulators[family], adapter=folder / "lora", base=str(case.base), output=folder / "corrected")
        return case, folder / "corrected"

    return make


def run(case: Case, adapter: Path, output: Path, **options: Any) -> RefinementResult:
    """Refine with all samples in every step."""
    options = {"steps": STEPS, "samples_per_step": 8, "step_size": STEP_SIZE, "max_length": MAX_LENGTH, **options}
    return refine(**{"base": str(case.base), "adapter": adapter, "data": case.data, "output": output, **options})


def adam(model: Any, losses: Sequence[Callable[[Any], torch.Tensor]], steps: int, size: float) -> list[float]:
    """Adam as its paper has it, on the LoRA tensors of a PEFT model, with the learning rates that `refine` promises.

    Returns the loss before each step.
    """
    tensors = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    rates = {}
    for side in ("lora_A", "lora_B"):
        values = torch.cat([value.detach().flatten() for name, value in tensors.items() if side in name])
        rates[side] = size * float(values.square().mean().sqrt())
    m = {name: torch.zeros_like(value) for name, value in tensors.items()}
    v = {name: torch.zeros_like(value) for name, value in tensors.items()}
    seen = []
    for step in range(steps):
        total = torch.stack([loss(model) for loss in losses]).sum()
        seen.append(total.item())
        gradients = torch.autograd.grad(total, list(tensors.values()))
        for (name, value), g in zip(tensors.items(), gradients, strict=True):
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g.square()
            unbiased = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            rate = rates["lora_A" if "lora_A" in name else "lora_B"] * math.sin(math.pi * (step + 0.5) / steps)
            value.data -= rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return seen


def in_memory(case: Case, adapter: Path) -> Any:
    """The base with the adapter as PEFT loads it, float64, its LoRA to be trained."""
    model = on(type(case.model).from_pretrained(case.base).eval(), adapter).double()
    model.set_experts_implementation("eager")  # fused experts have no float64 kernel
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


def of_memory(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of a PEFT model by module."""
    found = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    return {
        name: tuple(side["default"].weight.detach() for side in (module.lora_A, module.lora_B))  # type: ignore[misc]
        for name, module in found.items()
    }


def texts(case: Case) -> list[list[int]]:
    return pico.token_ids(case.data, case.base, MAX_LENGTH)


def mean_losses(samples: list[list[int]]) -> list[Callable[[Any], torch.Tensor]]:
    """Shares of the mean loss per predicted token, one of each sample."""
    tokens = sum(len(ids) - 1 for ids in samples)
    return [lambda model, ids=ids: next_token_loss((ids, 0))(model) / tokens for ids in samples]  # type: ignore[misc]


def distance(
    found: dict[str, tuple[torch.Tensor, torch.Tensor]], expected: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """The norm of all differences."""
    squares = [(a - b).square().sum() for name in expected for a, b in zip(found[name], expected[name], strict=True)]
    return math.sqrt(sum(float(square) for square in squares))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_adam_in_memory(corrected: Corrected, kind: str, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    case, adapter = corrected(family, **options)
    result = run(case, adapter, tmp_path / "refined")
    model = in_memory(case, adapter)
    losses = adam(model, mean_losses(texts(case)), STEPS, STEP_SIZE)
    start, found, expected = pairs(adapter), pairs(tmp_path / "refined"), of_memory(model)
    moved = distance(start, expected)
    assert distance(found, expected) < ROUNDING * moved
    assert result.losses == pytest.approx(losses, rel=1e-5)
    control = in_memory(case, adapter)
    adam(control, mean_losses(texts(case)), STEPS, 1.05 * STEP_SIZE)
    assert distance(found, of_memory(control)) > 10 * ROUNDING * moved, "a step 5% longer is told apart"
    assert losses[-1] < losses[0]


def test_batches_do_not_matter_and_padding_does_not_count(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    run(case, adapter, tmp_path / "one")
    run(case, adapter, tmp_path / "three", batch_size=3)
    one, three, start = (pairs(folder) for folder in (tmp_path / "one", tmp_path / "three", adapter))
    assert distance(three, one) < ROUNDING * distance(start, one)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_goes_the_way_of_float32(corrected: Corrected, tmp_path: Path, dtype: str) -> None:
    """One step of Adam moves every entry by its gradient's sign, also where it is a small part of many tokens."""
    case, adapter = corrected()
    data = pico.save_texts(tmp_path / "many.jsonl", count=300)
    options = {"data": data, "steps": 1, "samples_per_step": 300, "batch_size": 50}
    run(case, adapter, tmp_path / "float32", dtype="float32", **options)
    run(case, adapter, tmp_path / "half", dtype=dtype, **options)
    start, full, half = (pairs(folder) for folder in (adapter, tmp_path / "float32", tmp_path / "half"))
    alike = [
        torch.sign(full[name][side] - start[name][side]) == torch.sign(half[name][side] - start[name][side])
        for name in start
        for side in (0, 1)
    ]
    assert torch.cat([each.flatten() for each in alike]).double().mean() > 0.98


def test_samples_without_a_target_are_not_dealt(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    whole, cut = {"prompt": "a", "completion": " b c"}, {"prompt": "long " * 10, "completion": "x"}
    data = pico.save_records(tmp_path / "data.jsonl", [whole, cut])
    result = run(case, adapter, tmp_path / "refined", data=data, max_length=16, steps=2, samples_per_step=1)
    assert result.samples == 1
    assert all(math.isfinite(loss) for loss in result.losses)


def test_another_base_of_the_same_shapes_is_named(corrected: Corrected, tmp_path: Path) -> None:
    """Nothing but its name can tell: a corrected LoRA holds no hash of the weights."""
    case, adapter = corrected()
    shutil.copytree(case.base, tmp_path / "elsewhere" / case.base.name)
    shutil.copytree(case.base, tmp_path / "other")
    moved = run(case, adapter, tmp_path / "moved", base=str(tmp_path / "elsewhere" / case.base.name), steps=1)
    other = run(case, adapter, tmp_path / "named", base=str(tmp_path / "other"), steps=1)
    assert (moved.other_base, other.other_base) == (None, str(case.base))
    assert read_json(tmp_path / "named" / "emloc.json")["base"]["id"] == str(tmp_path / "other")


def test_only_the_completion_counts(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    data = pico.save_records(tmp_path / "data.jsonl", [{"prompt": "what is", "completion": f" the {n}"} for n in "abc"])
    result = run(case, adapter, tmp_path / "refined", data=data)
    [measured] = evaluate(base=str(case.base), data=data, adapters=[adapter], device="cpu")[1:]
    assert result.losses[0] == pytest.approx(measured.loss, rel=1e-5)


def test_the_base_is_better_on_other_samples(tmp_path: Path) -> None:
    """A LoRA of random numbers has everything to learn: the loss on samples of the same kind falls, far."""
    base = tmp_path / "base"
    pico.save_model(base)
    data, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    words = ["red", "blue", "green", "grey"]
    pico.save_records(data, [{"text": f"{a} {b} is {b} {a}"} for a in words for b in words if a != b])
    pico.save_records(heldout, [{"text": f"{a} {a} is {a} {a}"} for a in words])
    adapter = made(base, data, tmp_path)
    refine(
        base=str(base),
        adapter=adapter,
        data=data,
        output=tmp_path / "refined",
        steps=8,
        samples_per_step=12,
        device="cpu",
    )
    none, before, after = evaluate(base=str(base), data=heldout, adapters=[adapter, tmp_path / "refined"], device="cpu")
    assert after.loss < min(none.loss, before.loss) - 0.1
    assert after.corrected


def made(base: Path, data: Path, folder: Path, **options: Any) -> Path:
    """A corrected LoRA on an emulator of the base, by the stages."""
    from emloc_tools.stages.calibrate import calibrate

    calibrate(base=str(base), data=data, output=folder / "calibration", device="cpu")
    build_emulator(base=str(base), calibration=folder / "calibration", ratio=0.5, output=folder / "emulator")
    pico.save_lora(folder / "lora", folder / "emulator", **options)
    correct(emulator=folder / "emulator", adapter=folder / "lora", base=str(base), output=folder / "corrected")
    return folder / "corrected"


def test_every_weight_is_read_twice_a_step_at_most(
    corrected: Corrected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, adapter = corrected()
    reads: list[str] = []
    load = ModelWeights.load

    def counting(self: ModelWeights, names: Any, *options: Any) -> Any:
        reads.extend(names)
        return load(self, names, *options)

    monkeypatch.setattr(ModelWeights, "load", counting)
    run(case, adapter, tmp_path / "refined")
    for name in read_tensors(case.base):
        assert 1 <= reads.count(name) <= 2 * STEPS, name


def test_the_manifest_says_where_it_comes_from(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    result = run(case, adapter, tmp_path / "refined", command="the command line")
    run(case, tmp_path / "refined", tmp_path / "again", steps=1, seed=5)
    first, second, before = (
        read_json(folder / "emloc.json") for folder in (tmp_path / "refined", tmp_path / "again", adapter)
    )
    kept = ("base", "emulator", "trained_adapter", "clamp", "layers", "unchanged")
    assert {key: first[key] for key in kept} == {key: before[key] for key in kept}
    assert first["made_by"]["command"] == "the command line"
    assert (first["format_version"], first["selection"], first["component"]) == (4, None, None)
    [refinement] = first["refinements"]
    assert refinement["losses"] == result.losses
    assert len(result.losses) == STEPS
    assert refinement["data"]["hash"] == bytes_hash(case.data)
    assert refinement["data"]["samples"] == result.samples == 8
    assert refinement["data"]["tokens"] == result.tokens == sum(map(len, texts(case)))
    assert (refinement["step_size"], refinement["samples_per_step"]) == (STEP_SIZE, 8)
    assert second["refinements"][0] == refinement
    assert [len(each["losses"]) for each in second["refinements"]] == [STEPS, 1]
    assert second["refinements"][1]["adapter"] != refinement["adapter"]
    assert read_json(tmp_path / "again" / "adapter_config.json") == read_json(adapter / "adapter_config.json")


def test_the_same_inputs_give_the_same_bytes_and_other_samples_others(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run(case, adapter, tmp_path / name, seed=seed, samples_per_step=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert distance(pairs(tmp_path / "one"), pairs(tmp_path / "other")) > 0


@pytest.mark.parametrize(("steps", "size"), [(1, 0.05), (2, 0.1), (4, 0.2), (5, 0.2)])
def test_few_steps_are_shorter(corrected: Corrected, tmp_path: Path, steps: int, size: float) -> None:
    """By default: the first step of Adam, which does harm at full length, is a large part of them."""
    case, adapter = corrected()
    run(case, adapter, tmp_path / "default", steps=steps, step_size=None, samples_per_step=1)
    run(case, adapter, tmp_path / "given", steps=steps, step_size=size, samples_per_step=1)
    assert distance(pairs(tmp_path / "default"), pairs(tmp_path / "given")) == 0


def batches(sizes: Sequence[int]) -> list[Batch]:
    return [Batch({"input_ids": torch.zeros(size, 4, dtype=torch.long)}, None, None) for size in sizes]


def test_samples_are_dealt_once_before_any_is_dealt_again() -> None:
    given = batches([1] * 10)
    dealt = deal(given, steps=5, samples_per_step=4, seed=0)
    assert [len(step) for step in dealt] == [4] * 5
    places = {id(batch): place for place, batch in enumerate(given)}
    numbers = [places[id(batch)] for step in dealt for batch in step]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != sorted(numbers[:10])
    assert all(len({id(batch) for batch in step}) == 4 for step in dealt)


def test_a_step_takes_whole_batches_and_never_one_twice() -> None:
    given = batches([3, 3, 3])
    assert [len(step) for step in deal(given, steps=2, samples_per_step=4, seed=0)] == [2, 2]
    assert [len(step) for step in deal(given, steps=2, samples_per_step=64, seed=0)] == [3, 3]


@contextlib.contextmanager
def refused(error: type[Exception], *parts: str) -> Iterator[None]:
    """The block raises `error`, whose one line has all the parts."""
    with pytest.raises(error) as caught:
        yield
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_what_cannot_be_refined_is_refused_and_nothing_is_written(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    lora, output = adapter.parent / "lora", tmp_path / "refined"
    with refused(MismatchError, "is not corrected", "emloc-tools correct"):
        run(case, lora, output)
    with refused(InputError, "--step-size", "above 0"):
        run(case, adapter, output, step_size=0.0)
    with refused(InputError, "would replace the input"):
        run(case, adapter, adapter, overwrite=True)
    pico.save_model(tmp_path / "other", "gpt2")
    with refused(MismatchError, "GPT2LMHeadModel", "LlamaForCausalLM"):
        run(case, adapter, output, base=str(tmp_path / "other"))
    wide = transformers.LlamaConfig(**{**pico.LLAMA, "hidden_size": 64})
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    with refused(MismatchError, "was trained on another model"):
        run(case, adapter, output, base=str(tmp_path / "wide"))
    with refused(InputError, "does not exist"):
        run(case, adapter, output, data=tmp_path / "nowhere.jsonl")
    short = pico.save_records(tmp_path / "short.jsonl", [{"prompt": "long " * 40, "completion": "x"}])
    with refused(InputError, "--max-length"):
        run(case, adapter, output, data=short, max_length=8)
    assert not output.exists()


def test_a_lora_that_was_never_trained_is_refused(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    lora = changed(
        adapter.parent / "lora", tmp_path / "lora", tensor=lambda name, value: (name, value * ("lora_A" in name))
    )
    emulator = tmp_path / "emulator"
    build_emulator(base=str(case.base), calibration=case.calibration, ratio=0.5, output=emulator)
    correct(emulator=emulator, adapter=lora, base=str(case.base), output=tmp_path / "corrected")
    with refused(InputError, "every B of the LoRA is zero"):
        run(case, tmp_path / "corrected", tmp_path / "refined")


def test_a_base_that_gives_no_number_is_refused(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    shutil.copytree(case.base, tmp_path / "broken")
    tensors = read_tensors(case.base)
    tensors["lm_head.weight"] *= 1e38 / tensors["lm_head.weight"].abs().max()
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with refused(NumericalError, "not finite"):
        run(case, adapter, tmp_path / "refined", base=str(tmp_path / "broken"))
    assert not (tmp_path / "refined").exists()


def test_other_tensors_than_pairs_are_refused(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected("llama", modules_to_save=["norm"])
    with refused(UnsupportedError, "modules_to_save"):
        run(case, adapter, tmp_path / "refined")


def test_a_changed_record_is_noticed(corrected: Corrected, tmp_path: Path) -> None:
    case, adapter = corrected()
    run(case, adapter, tmp_path / "refined", steps=1)
    path = tmp_path / "refined" / "emloc.json"
    write_json(path, {**read_json(path), "refinements": []})
    with refused(FormatError, "A9", "refinements"):
        evaluate(base=str(case.base), data=case.data, adapters=[tmp_path / "refined"])


def test_a_sequence_classifier_learns_its_labels(tmp_path: Path) -> None:
    """The loss is that of the label, as a mean over the samples."""
    base, data = tmp_path / "base", classifiers.save_labelled(tmp_path / "data.jsonl", count=12)
    classifiers.save_base(tmp_path / "body", "llama")
    fit_head(base=str(tmp_path / "body"), data=data, output=base, device="cpu")
    adapter = made(base, data, tmp_path, task_type=None, target_modules=["q_proj", "v_proj", "down_proj"])
    result = refine(base=str(base), adapter=adapter, data=data, output=tmp_path / "refined", samples_per_step=12)
    before, after = evaluate(base=str(base), data=data, adapters=[adapter, tmp_path / "refined"], device="cpu")[1:]
    assert result.losses[0] == pytest.approx(before.loss, rel=1e-5)
    assert after.loss < result.losses[-1] < before.loss
