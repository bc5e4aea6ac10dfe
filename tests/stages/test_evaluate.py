"""evaluate: the figures are those of a plain loop with from_pretrained and PEFT, at one pass over the weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F

from emloc_tools import load_emulator
from emloc_tools.errors import InputError, MismatchError, NumericalError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.stages import scoring
from emloc_tools.stages.evaluate import evaluate
from tests import pico
from tests.conftest import Run
from tests.stages.adapters import changed, on

RECORDS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "a few words"}, {"text": "and a longer sentence, for once"}, {"text": "short"}, {"text": "x y"}],
    "messages": [
        {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]},
        {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "somebody or other"}]},
    ],
    "prompt and completion": [
        {"prompt": "one and one is ", "completion": "two"},
        {"prompt": "red, ", "completion": "green and blue"},
        {"prompt": [{"role": "user", "content": "why?"}], "completion": [{"role": "assistant", "content": "so"}]},
    ],
}


def tokenised(records: list[dict[str, Any]], folder: Path) -> list[tuple[list[int], int]]:
    """Token ids of each record, and the first token that counts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def chat(messages: list[dict[str, str]], ask: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found = []
    for record in records:
        if "text" in record:
            found.append((tokenizer(record["text"])["input_ids"], 0))
        elif "messages" in record:
            found.append((chat(record["messages"], False), 0))
        elif isinstance(record["prompt"], str):
            whole = tokenizer(record["prompt"] + record["completion"])["input_ids"]
            found.append((whole, len(tokenizer(record["prompt"])["input_ids"])))
        else:
            found.append((chat(record["prompt"] + record["completion"], False), len(chat(record["prompt"], True))))
    return found


def plain_loop(model: Any, samples: list[tuple[list[int], int]]) -> tuple[float, float, int]:
    """Mean loss, accuracy and number of target tokens, one sample at a time."""
    loss, right, count = 0.0, 0, 0
    for ids, start in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        for position in range(max(start, 1), len(ids)):
            loss += float(F.cross_entropy(logits[position - 1], torch.tensor(ids[position])))
            right += int(logits[position - 1].argmax()) == ids[position]
            count += 1
    return loss / count, right / count, count


def base_model(run: Run) -> Any:
    """The base, loaded anew."""
    return transformers.AutoModelForCausalLM.from_pretrained(run.base).eval()


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_and_accuracy_are_those_of_a_plain_loop(run: Run, tmp_path: Path, kind: str, batch_size: int) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", RECORDS[kind])
    samples = tokenised(RECORDS[kind], run.base)
    assert len({len(ids) for ids, _ in samples}) > 1, "without different lengths nothing is padded"
    found = evaluate(
        base=str(run.base),
        emulator=run.emulator,
        adapters=[run.adapter, run.corrected],
        data=data,
        batch_size=batch_size,
        device="cpu",
    )
    emulator = load_emulator(run.emulator).eval()
    expected = {
        ("base", None): plain_loop(base_model(run), samples),
        ("base", str(run.adapter)): plain_loop(on(base_model(run), run.adapter), samples),
        ("base", str(run.corrected)): plain_loop(on(base_model(run), run.corrected), samples),
        ("emulator", None): plain_loop(emulator, samples),
        ("emulator", str(run.adapter)): plain_loop(on(load_emulator(run.emulator), run.adapter), samples),
    }
    assert [(result.model, result.adapter) for result in found] == list(expected)
    for result in found:
        loss, accuracy, tokens = expected[result.model, result.adapter]
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.accuracy == pytest.approx(accuracy)
        assert result.tokens == tokens
        assert result.corrected == (result.adapter == str(run.corrected))
        assert result.perplexity == pytest.approx(float(torch.tensor(loss, dtype=torch.float64).exp()), rel=1e-4)
    assert len({round(result.loss, 6) for result in found}) == len(found), "adapters must make a difference"


def test_of_prompt_and_completion_only_the_completion_counts(run: Run, tmp_path: Path) -> None:
    texts = [{"text": record["prompt"] + record["completion"]} for record in RECORDS["prompt and completion"][:2]]
    pico.write_jsonl(tmp_path / "pairs.jsonl", RECORDS["prompt and completion"][:2])
    pico.write_jsonl(tmp_path / "texts.jsonl", texts)
    pairs, whole = (
        evaluate(base=str(run.base), data=tmp_path / name, device="cpu")[0] for name in ("pairs.jsonl", "texts.jsonl")
    )
    assert pairs.tokens == len("two") + len("green and blue")
    assert whole.tokens > pairs.tokens
    assert abs(whole.loss - pairs.loss) > 1e-3


def test_ready_inputs_count_their_labels(run: Run, tmp_path: Path) -> None:
    samples = tokenised(RECORDS["prompt and completion"][:2], run.base)
    tensors = {}
    for number, (ids, start) in enumerate(samples):
        tensors[f"{number}/input_ids"] = torch.tensor([ids])
        tensors[f"{number}/labels"] = torch.tensor([[-100] * start + ids[start:]])
    save_file(tensors, tmp_path / "in.safetensors")
    (result,) = evaluate(base=str(run.base), data=tmp_path / "in.safetensors", device="cpu")
    loss, accuracy, tokens = plain_loop(base_model(run), samples)
    assert (result.loss, result.accuracy, result.tokens) == (pytest.approx(loss), pytest.approx(accuracy), tokens)


def test_a_sample_is_exact_if_all_its_targets_are_predicted_rightly(run: Run, tmp_path: Path) -> None:
    """Greedy continuations, of which one is spoilt in its last token; a row without targets does not count."""
    ids = torch.tensor([[5], [6], [7], [8]])
    while ids.shape[1] < 6:
        with torch.no_grad():
            ids = torch.cat([ids, run.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    ids[1, -1] = (ids[1, -1] + 1) % pico.VOCABULARY
    labels = ids.clone()
    labels[3] = -100
    save_file({"0/input_ids": ids, "0/labels": labels}, tmp_path / "in.safetensors")
    (result,) = evaluate(base=str(run.base), data=tmp_path / "in.safetensors", device="cpu")
    assert result.exact == pytest.approx(2 / 3)
    assert result.accuracy == pytest.approx(14 / 15)
    assert result.tokens == 15


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy(run: Run, tmp_path: Path) -> None:
    model = base_model(run)
    with torch.no_grad():
        model.lm_head.weight.sign_().mul_(3e38)  # finite by itself, infinite in the logits
    model.save_pretrained(tmp_path / "base")
    pico.save_tokenizer(tmp_path / "base")
    with pytest.raises(NumericalError, match="base: the loss is not finite; try --dtype float32"):
        evaluate(base=str(tmp_path / "base"), data=run.data, device="cpu")


def test_all_adapters_share_one_pass_over_the_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", RECORDS["text"])
    reads: Counter[str] = Counter()
    original = TensorFolder.read

    def counted(self: TensorFolder, name: str, *rest: Any) -> torch.Tensor:
        if name in stored:
            reads[name] += 1
        return original(self, name, *rest)

    stored = set(run.model.state_dict())
    monkeypatch.setattr(TensorFolder, "read", counted)
    options: dict[str, Any] = {
        "base": str(run.base),
        "adapters": [run.adapter, run.corrected],
        "data": data,
        "device": "cpu",
    }
    at_once = evaluate(**options)
    assert reads == dict.fromkeys(stored, 1)
    monkeypatch.setattr(scoring, "TOKENS_IN_FLIGHT", 40)  # too few for all batches: the model streams by more often
    in_waves = evaluate(**options)
    assert min(reads.values()) > 2
    assert [result.loss for result in in_waves] == pytest.approx([result.loss for result in at_once])


def test_samples_and_seed_choose_the_data(run: Run, tmp_path: Path) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", RECORDS["text"])
    losses = [
        evaluate(base=str(run.base), data=data, samples=1, seed=seed, device="cpu")[0].loss for seed in (0, 0, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) > 1


def test_neither_base_nor_emulator_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match="give --base, --emulator or both"):
        evaluate(data=run.data)


def test_a_corrected_adapter_without_its_base_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match=r"is corrected, so it belongs to the base .* give --base"):
        evaluate(emulator=run.emulator, adapters=[run.corrected], data=run.data)


def test_an_adapter_of_other_widths_is_refused(run: Run, tmp_path: Path) -> None:
    def narrower(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, value[:, 1:] if "lora_A" in name else value

    adapter = changed(run.adapter, tmp_path / "adapter", tensor=narrower)
    with pytest.raises(
        MismatchError, match=r"the layer of the base is \d+ x \d+; the adapter was trained on another model"
    ):
        evaluate(base=str(run.base), adapters=[adapter], data=run.data, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "was trained with use_dora"),
        ({"modules_to_save": ["lm_head"]}, r"holds base_model\.model\.lm_head\.weight beside LoRA pairs"),
    ],
)
def test_adapters_beyond_plain_pairs_are_refused(
    run: Run, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    pico.save_lora(tmp_path / "adapter", run.emulator, **options)
    with pytest.raises(UnsupportedError, match=message):
        evaluate(base=str(run.base), adapters=[tmp_path / "adapter"], data=run.data, device="cpu")


def test_a_model_that_does_not_predict_the_next_token_is_refused(tmp_path: Path, run: Run) -> None:
    pico.save_model(tmp_path / "bert", "bert")
    with pytest.raises(UnsupportedError, match="BertForMaskedLM does not predict the next token"):
        evaluate(base=str(tmp_path / "bert"), data=run.data, device="cpu")


def test_data_without_a_target_are_refused(run: Run, tmp_path: Path) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match="hold no token to predict"):
        evaluate(base=str(run.base), data=data, device="cpu")


def test_progress_grows_to_its_total_over_both_models(run: Run, tmp_path: Path) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", RECORDS["text"])
    steps: list[Any] = []
    evaluate(base=str(run.base), emulator=run.emulator, data=data, device="cpu", progress=steps.append)
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert {step.total for step in steps} == {done[-1]}
    assert json.dumps([step.detail for step in steps]).count("emulator") == len(steps) // 2
