"""The limits of a model are those that its configuration tells, in whatever way it says that there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from emloc_tools.errors import InputError
from emloc_tools.models.limits import limits_of

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "positions", "learned"),
    [
        (transformers.LlamaConfig(**SMALL, max_position_embeddings=24), 24, False),
        (transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=24), 24, True),
        (transformers.XLNetConfig(vocab_size=40, d_model=32, n_layer=1, n_head=2, d_inner=8), None, True),
        (transformers.T5Config(vocab_size=40, d_model=32, num_layers=1), None, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_and_vocabulary(config: Any, positions: int | None, learned: bool) -> None:
    limits = limits_of(config)
    assert (limits.positions, limits.vocabulary, limits.learned) == (positions, 40, learned)


def test_a_tokenizer_may_know_of_fewer_tokens_where_positions_are_learned() -> None:
    """RoBERTa keeps two of its positions for padding."""
    tokenizer = SimpleNamespace(model_max_length=22)
    learned = limits_of(transformers.RobertaConfig(**SMALL, max_position_embeddings=24))
    rotary = limits_of(transformers.LlamaConfig(**SMALL, max_position_embeddings=24))
    assert (learned.of_texts(tokenizer), rotary.of_texts(tokenizer)) == (22, 24)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    limits = limits_of(transformers.LlamaConfig(**SMALL))
    limits.check_ids("here", 0, 39)
    for low, high in ((0, 40), (-1, 39)):
        with pytest.raises(InputError, match=r"here: token (40|-1) is outside the model's vocabulary of 40"):
            limits.check_ids("here", low, high)
