"""What programs refuse, or leave out without a word, is said before they are run; what they serve is not refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_tools.adapters.consumers import RELEASES, VLLM_RANKS, Serving
from emloc_tools.cli.verify import CONSUMERS
from emloc_tools.errors import InputError
from emloc_tools.stages.verify import verify
from tests.adapters import subjects
from tests.adapters.subjects import Subject

Q = {"target_modules": ["q_proj"]}
# Options of the LoRA, and what of the line that each program's check gives; None where the program serves it.
TABLE: dict[str, tuple[dict[str, Any], dict[str, str | None]]] = {
    "plain": (Q, dict.fromkeys(("peft", "vllm", "sglang", "llama.cpp"))),
    "rsLoRA": (
        {**Q, "use_rslora": True},
        {"peft": None, "vllm": None, "sglang": "does not read use_rslora", "llama.cpp": "does not read use_rslora"},
    ),
    "alpha_pattern": (
        {**Q, "alpha_pattern": {r"layers\.1\..*": 9}},
        {"peft": None, "vllm": None, "sglang": "1 of 3 pairs", "llama.cpp": r"by 1\.5 instead of 2\.25"},
    ),
    "rank_pattern": (
        {**Q, "rank_pattern": {r"layers\.1\..*": 2}},
        {"peft": None, "vllm": None, "sglang": "room for the rank r = 4 alone", "llama.cpp": None},
    ),
    "DoRA": (
        {**Q, "use_dora": True},
        {"peft": None, "vllm": "refuses use_dora", "sglang": "refuses use_dora", "llama.cpp": "lora_magnitude_vector"},
    ),
    "LoRA bias": (
        {**Q, "lora_bias": True},
        {"peft": None, "vllm": "refuses lora_bias", "sglang": "applies pairs only", "llama.cpp": r"lora_B\.bias"},
    ),
    "saved head": (
        {**Q, "modules_to_save": ["lm_head"]},
        {"peft": None, "vllm": "modules_to_save of other modules", "sglang": "applies pairs", "llama.cpp": "lm_head"},
    ),
    "saved norms": (
        {**Q, "modules_to_save": ["norm"]},
        {"vllm": "modules_to_save", "sglang": "applies pairs only", "llama.cpp": "loads no norms"},
    ),
    "trained tokens": (
        {**Q, "trainable_token_indices": [3]},
        {"peft": None, "vllm": "trainable_tokens_delta", "sglang": "pairs only", "llama.cpp": "trainable_tokens_delta"},
    ),
    "embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"peft": None, "vllm": None, "llama.cpp": None},
    ),
    "PiSSA": ({**Q, "init_lora_weights": "pissa"}, {"vllm": "refuses init_lora_weights='pissa'"}),
    "activated": ({**Q, "alora_invocation_tokens": [1, 2]}, {"vllm": "refuses alora_invocation_tokens"}),
}
CASES = [
    pytest.param(options, consumer, expected, id=f"{name} for {consumer}")
    for name, (options, answers) in TABLE.items()
    for consumer, expected in answers.items()
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subjects.make(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def trained(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Adapters by their options, each trained once."""
    made: dict[str, Path] = {}

    def make(options: dict[str, Any]) -> Path:
        if str(options) not in made:
            made[str(options)] = tmp_path_factory.mktemp("trained") / "adapter"
            subjects.train(subject.model, subject.base, made[str(options)], **options)
        return made[str(options)]

    return make


def asked(subject: Subject, adapter: Path, consumer: str, **options: Any) -> Serving:
    result = verify(adapter=adapter, base=str(subject.base), consumers=[consumer], **options)
    assert result.problems == []
    return result.serving[0]


def test_the_command_offers_every_program() -> None:
    assert set(CONSUMERS) == set(RELEASES)


@pytest.mark.parametrize(("options", "consumer", "expected"), CASES)
def test_each_kind_is_served_or_refused(
    subject: Subject, trained: Any, options: dict[str, Any], consumer: str, expected: str | None
) -> None:
    found = asked(subject, trained(options), consumer)
    if expected is None:
        assert found.problems == []
        assert found.options != []
    else:
        assert re.search(expected, found.problems[0])


@pytest.mark.parametrize(
    ("rank", "option"),
    [(1, 1), (4, 8), (8, 8), (9, 16), (17, 32), (33, 64), (65, 128), (300, 320), (321, 512), (513, None)],
)
def test_vllm_is_told_the_smallest_of_its_ranks_that_suffices(
    subject: Subject, trained: Any, rank: int, option: int | None
) -> None:
    found = asked(subject, trained({**Q, "r": rank}), "vllm")
    if option is None:
        assert found.problems == ["takes ranks up to 512, and the largest here is 513"]
    else:
        assert found.options == [f"--max-lora-rank {option}"]
        assert option == min(allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank)
        assert option in VLLM_RANKS


def test_the_largest_rank_of_a_pattern_counts(subject: Subject, trained: Any) -> None:
    found = asked(subject, trained({**Q, "rank_pattern": {r"layers\.1\..*": 20}}), "vllm")
    assert found.options == ["--max-lora-rank 32"]
    assert "releases that read r and lora_alpha alone" in found.notes[0]


@pytest.mark.parametrize("consumer", ["llama.cpp", "sglang"])
@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha_pattern": {r"layers\.1\..*": 9}}], ids=str)
def test_folding_makes_an_adapter_that_is_served(
    subject: Subject, trained: Any, tmp_path: Path, consumer: str, options: dict[str, Any]
) -> None:
    adapter = trained({**Q, **options})
    assert "--fold-scaling" in asked(subject, adapter, consumer).problems[0]
    found = asked(subject, adapter, consumer, fold_scaling=True, output=tmp_path / "folded")
    assert found.problems == []
    assert str(tmp_path / "folded") in " ".join(found.options) or consumer == "sglang"


def test_llama_cpp_has_no_head_of_its_own_where_it_is_tied(tmp_path: Path) -> None:
    message = "has no lm_head of its own where it is tied to the embeddings"
    tied = subjects.make(tmp_path / "tied", "llama-tied", target_modules=["lm_head", "q_proj"])
    assert message in asked(tied, tied.adapter, "llama.cpp").problems[0]
    free = subjects.make(tmp_path / "free", "llama", target_modules=["lm_head", "q_proj"])
    assert asked(free, free.adapter, "llama.cpp").problems == []


def test_a_head_of_a_classifier_is_served_by_vllm(subject: Subject, tmp_path: Path) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", modules_to_save=["classifier", "score"])
    weights = adapter / subjects.WEIGHTS
    save_file(load_file(weights) | {f"{subjects.PREFIX}score.weight": torch.zeros(2, 32)}, weights)
    assert asked(subject, adapter, "vllm").problems == []


def test_an_unknown_program_is_refused(subject: Subject) -> None:
    with pytest.raises(InputError, match=r"tgi is not among peft, vllm, sglang, llama\.cpp, diffusers"):
        verify(adapter=subject.adapter, base=str(subject.base), consumers=["tgi"])
