"""How long a model's inputs may be and which token ids it knows, told before hours of work and not after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emloc_tools.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Token positions and vocabulary of a model; None where it has no such limit or does not tell."""

    positions: int | None
    vocabulary: int | None
    learned: bool

    def of_texts(self, tokenizer: Any) -> int | None:
        """Tokens that a text may have. Some models with learned positions (RoBERTa) keep a few for padding."""
        if self.positions is not None and self.learned:
            return min(self.positions, int(tokenizer.model_max_length))
        return self.positions

    def check_ids(self, where: str, low: int, high: int) -> None:
        """Refuse token ids that the model has no embedding for."""
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            worst = low if low < 0 else high
            size = "" if self.vocabulary is None else f" of {self.vocabulary}"
            raise InputError(f"{where}: token {worst} is outside the model's vocabulary{size}")


def limits_of(config: Any) -> Limits:
    """The limits that a model's configuration tells."""
    text = config.get_text_config()
    try:
        positions = getattr(text, "max_position_embeddings", None)
    except NotImplementedError:  # XLNet's way of saying that it has no limit
        positions = None
    # Models of several modalities may give placeholder tokens ids beyond the text vocabulary.
    vocabulary = getattr(config, "vocab_size", None) if text is config else None
    learned = getattr(text, "rope_parameters", None) is None
    return Limits(positions if isinstance(positions, int) and positions > 0 else None, vocabulary, learned)
