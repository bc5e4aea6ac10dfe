"""Records as samples for models that read text alone: their token ids, what counts in a loss, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from emloc_tools.data.chats import text_in, texts_of
from emloc_tools.data.images import as_parts
from emloc_tools.models.labels import label_id
from emloc_tools.models.processors import reads_images

# Model inputs, mask of real tokens, targets of a loss and labels of whole samples, as a Batch has them.
Collated = tuple[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Sample:
    """Token ids of one sample, and the position of the first token that counts in a loss.

    `label` is the id of the whole sample's label; `types` tells the two texts of a pair apart, token by token, for
    models that read it.
    """

    ids: list[int]
    loss_from: int
    label: int | None = None
    types: list[int] | None = None


S = TypeVar("S", bound=Sample)


class Reader(Protocol[S]):
    """Turns the records of a data file into samples, and samples into batches."""

    def encode(self, record: Mapping[str, Any]) -> S:
        """The sample of a record. Raises `ValueError`, `TypeError` or `InputError` for a bad one."""

    def collate(self, samples: Sequence[S]) -> Collated:
        """A batch of samples, padded on the right."""


class TextReader:
    """Encodes records with `text`, `messages`, or `prompt` and `completion`, cut at `longest` tokens."""

    def __init__(self, tokenizer: Any, config: Any, longest: int | None) -> None:
        self._tokenizer, self._longest = tokenizer, longest
        self._wants_parts = reads_images(config)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def encode(self, record: Mapping[str, Any]) -> Sample:
        """The sample of a record. Raises `ValueError` or `TypeError` for a bad one."""
        texts = texts_of(as_parts(record) if self._wants_parts else record, self._tokenizer)
        ids = self._tokenizer(texts.whole, add_special_tokens=texts.special)["input_ids"]
        start = 0
        if texts.prompt:
            start = common_prefix(self._tokenizer(texts.prompt, add_special_tokens=texts.special)["input_ids"], ids)
        ids = ids[: self._longest]
        if not ids:
            raise ValueError("the text is empty")
        return Sample(list(ids), start)

    def collate(self, samples: Sequence[Sample]) -> Collated:
        """Right-padded token ids. Without padding no attention mask is passed to the model."""
        length = max(len(sample.ids) for sample in samples)
        ids = torch.full((len(samples), length), self._pad)
        mask = torch.zeros(len(samples), length, dtype=torch.bool)
        targets = torch.zeros_like(mask)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
            mask[row, : len(sample.ids)] = True
            targets[row, sample.loss_from : len(sample.ids)] = True
        inputs = {"input_ids": ids}
        if any(sample.types is not None for sample in samples):
            inputs["token_type_ids"] = torch.zeros_like(ids)
            for row, sample in enumerate(samples):
                inputs["token_type_ids"][row, : len(sample.ids)] = torch.tensor(sample.types or [0])
        if not mask.all():
            inputs["attention_mask"] = mask.long()
        labels = [sample.label for sample in samples if sample.label is not None]
        return inputs, mask, targets, torch.tensor(labels) if labels else None


class LabelledReader(TextReader):
    """Encodes records with `text`, perhaps `text_pair`, and a `label`, for a sequence classifier."""

    def __init__(self, tokenizer: Any, config: Any, longest: int | None, labels: Mapping[str, int]) -> None:
        super().__init__(tokenizer, config, longest)
        self._labels = labels
        self._has_types = getattr(config, "type_vocab_size", 0) > 1
        pad = config.get_text_config().pad_token_id
        if pad is not None:
            self._pad = pad  # decoders give a sample the logits before its padding, by this id

    def encode(self, record: Mapping[str, Any]) -> Sample:
        """The sample of a record, cut as trainers cut it, so that the special tokens at its end stay."""
        if "text" not in record:
            raise ValueError(f"found the keys {sorted(record)}, expected `text` and `label`")
        pair = text_in(record, "text_pair") if "text_pair" in record else None
        label = label_id(record["label"], self._labels) if "label" in record else None
        cut = {"truncation": True, "max_length": self._longest} if self._longest is not None else {}
        has_types = self._has_types and pair is not None
        found = self._tokenizer(text_in(record, "text"), pair, return_token_type_ids=has_types, **cut)
        if not found["input_ids"]:
            raise ValueError("the text is empty")
        types = found.get("token_type_ids")
        return Sample(list(found["input_ids"]), len(found["input_ids"]), label, None if types is None else list(types))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
