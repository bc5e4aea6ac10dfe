"""Samples of a downstream task: JSONL with `text`, `messages` or `prompt` and `completion`, or ready model inputs.

For a sequence classifier JSONL has `text`, `text_pair` where there are two, and `label`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from emloc_tools.errors import FormatError, InputError
from emloc_tools.files.tensors import TensorFile
from emloc_tools.models.labels import label_id, labels_of
from emloc_tools.models.limits import Limits, limits_of
from emloc_tools.models.skeleton import load_config, reason
from emloc_tools.models.source import Source, first_line


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


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of the model's forward; which tokens are real, and which are targets of a loss.

    `mask (batch, length)` is None where everything is real; `targets (batch, length)` is None for inputs without
    text samples. Both bool. `labels (batch,)` int64 are those of whole samples; then no token is a target.
    """

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None
    targets: torch.Tensor | None
    labels: torch.Tensor | None = None


def load_batches(
    path: Path,
    source: Source,
    *,
    samples: int | None,
    max_length: int | None,
    batch_size: int,
    seed: int,
    trust_remote_code: bool = False,
    config: Any = None,
) -> list[Batch]:
    """The data of `path` as batches: `samples` of its entries, chosen by `seed` if there are more, in file order.

    A `.safetensors` file holds ready inputs named `<n>/<argument>`, one batch for each n. Anything else is JSONL;
    texts are cut at `max_length` tokens, and at the positions that the model has if those are fewer. A sequence
    classifier takes a `label` of each record, or of none. `config` is the model's configuration where it is not that
    in the folder. Raises `InputError` naming the line or tensor at fault, also where token ids, labels or ready inputs
    do not fit the model.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected JSONL or a .safetensors file of model inputs")
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected JSONL or a .safetensors file of model inputs")
    if config is None:
        config = load_config(source, trust_remote_code=trust_remote_code)
    limits = limits_of(config)
    if path.suffix == ".safetensors":
        return _ready_inputs(path, samples, seed, limits)
    lines = _choose(list(_line_starts(path)), samples, seed)
    if not lines:
        raise InputError(f"{path} holds no sample; expected one JSON object per line")
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    longest = min((limit for limit in (max_length, limits.of_texts(tokenizer)) if limit is not None), default=None)
    labels = labels_of(config)
    if labels is None:
        encoded = [_encode(path, number, record, tokenizer, longest) for number, record in _records(path, lines)]
    else:
        has_types = getattr(config, "type_vocab_size", 0) > 1
        encoded = [
            _encode_labelled(path, number, record, tokenizer, longest, labels, has_types)
            for number, record in _records(path, lines)
        ]
        _require_all_or_none(path, lines, encoded)
    for (number, _), sample in zip(lines, encoded, strict=True):
        limits.check_ids(f"{path}:{number}", min(sample.ids), max(sample.ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if labels is not None and config.get_text_config().pad_token_id is not None:
        pad = config.get_text_config().pad_token_id  # decoders give a sample the logits before its padding, by this id
    groups = (encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size))
    return [_collate(group, pad) for group in groups]


def count_tokens(batches: Sequence[Batch]) -> int:
    """Real tokens in all batches; for inputs without token ids, their samples."""
    return sum(_tokens(batch) for batch in batches)


def count_samples(batches: Sequence[Batch]) -> int:
    """Samples in all batches: rows of token ids; for inputs without them, the longest first dimension."""
    return sum(_samples(batch.inputs) for batch in batches)


def read_labels(path: Path) -> list[object]:
    """The `label` of every record of a JSONL file, as it stands there. Raises `InputError` for a record without."""
    if path.suffix == ".safetensors" or not path.is_file():
        raise InputError(f"{path} is no JSONL file; expected one object with `text` and `label` per line")
    found = []
    for number, record in _records(path, list(_line_starts(path))):
        if "label" not in record:
            raise InputError(f"{path}:{number}: found the keys {sorted(record)}, expected `text` and `label`")
        found.append(record["label"])
    return found


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the base model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source.id}: no usable tokenizer for text data: {reason(error)}") from error


def _samples(inputs: Mapping[str, torch.Tensor]) -> int:
    ids = inputs.get("input_ids")
    if ids is not None:
        return ids.shape[0]
    return max((tensor.shape[0] for tensor in inputs.values() if tensor.dim()), default=1)


def _tokens(batch: Batch) -> int:
    if batch.mask is not None:
        return int(batch.mask.sum())
    ids = batch.inputs.get("input_ids")
    return ids.numel() if ids is not None else _samples(batch.inputs)


def _line_starts(path: Path) -> Iterator[tuple[int, int]]:
    """Number (from 1) and byte offset of every line that is not blank."""
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, start
            start += len(line)


def _choose(items: list[Any], count: int | None, seed: int) -> list[Any]:
    if count is None or count >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]


def _records(path: Path, lines: Sequence[tuple[int, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, start in lines:
            file.seek(start)
            try:
                record = json.loads(file.readline().decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: {type(record).__name__} found, expected a JSON object")
            yield number, record


def _encode(path: Path, number: int, record: dict[str, Any], tokenizer: Any, max_length: int | None) -> Sample:
    try:
        prompt, whole, special = _texts(record, tokenizer)
        ids = tokenizer(whole, add_special_tokens=special)["input_ids"]
        start = _common_prefix(tokenizer(prompt, add_special_tokens=special)["input_ids"], ids) if prompt else 0
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}:{number}: {first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):
            raise InputError(f"{path}:{number}: the chat template refuses the messages: {error}") from error
        raise
    if max_length is not None:
        ids = ids[:max_length]
    if not ids:
        raise InputError(f"{path}:{number}: the text is empty")
    return Sample(list(ids), start)


def _encode_labelled(
    path: Path,
    number: int,
    record: dict[str, Any],
    tokenizer: Any,
    max_length: int | None,
    labels: Mapping[str, int],
    has_types: bool,
) -> Sample:
    """A record for a sequence classifier: cut as trainers cut it, so that the special tokens at its end stay."""
    try:
        if "text" not in record:
            raise ValueError(f"found the keys {sorted(record)}, expected `text` and `label`")
        pair = _text(record, "text_pair") if "text_pair" in record else None
        label = label_id(record["label"], labels) if "label" in record else None
        cut = {"truncation": True, "max_length": max_length} if max_length is not None else {}
        found = tokenizer(_text(record, "text"), pair, return_token_type_ids=has_types and pair is not None, **cut)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}:{number}: {first_line(error)}") from error
    if not found["input_ids"]:
        raise InputError(f"{path}:{number}: the text is empty")
    types = found.get("token_type_ids")
    return Sample(list(found["input_ids"]), len(found["input_ids"]), label, None if types is None else list(types))


def _require_all_or_none(path: Path, lines: Sequence[tuple[int, int]], samples: Sequence[Sample]) -> None:
    """A label is missing by mistake where other records have one."""
    missing = [number for (number, _), sample in zip(lines, samples, strict=True) if sample.label is None]
    if missing and len(missing) < len(samples):
        raise InputError(f"{path}:{missing[0]}: has no `label`, although other records have one")


def _texts(record: dict[str, Any], tokenizer: Any) -> tuple[str, str, bool]:
    """The part of a record that a loss skips, the whole text, and whether special tokens are to be added."""
    if "messages" in record:
        return "", _chat(record["messages"], tokenizer, False), False
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _chat(prompt, tokenizer, True), _chat(prompt + completion, tokenizer, False), False
        return _text(record, "prompt"), _text(record, "prompt") + _text(record, "completion"), True
    if "text" in record:
        return "", _text(record, "text"), True
    raise ValueError(f"found the keys {sorted(record)}, expected `text`, `messages`, or `prompt` and `completion`")


def _text(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise TypeError(f"`{key}` is {type(record[key]).__name__}, expected a string")
    return cast(str, record[key])


def _chat(messages: Any, tokenizer: Any, ask: bool) -> str:
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` must be a list of at least one message")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise ValueError("every message must be an object with a `role`; templates skip others without an error")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the base's tokenizer has no chat template, which `messages` need; use `text` instead")
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Right-padded token ids. Without padding there is no mask, and no attention mask is passed to the model."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), length), pad)
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
    labels = [sample.label for sample in samples if sample.label is not None]
    known = torch.tensor(labels) if labels else None
    if mask.all():
        return Batch(inputs, None, targets, known)
    return Batch({**inputs, "attention_mask": mask.long()}, mask, targets, known)


def _ready_inputs(path: Path, samples: int | None, seed: int, limits: Limits) -> list[Batch]:
    try:
        file = TensorFile(path)
    except FormatError as error:
        raise InputError(f"{error}; expected model inputs named <n>/<argument>") from error
    with closing(file):
        numbers: dict[int, dict[str, str]] = {}
        for name in file.specs():
            match = re.fullmatch(r"(0|[1-9]\d*)/(\w+)", name)
            if match is None:
                raise InputError(f"{path}: the tensor {name!r} is not named <n>/<argument>, such as 0/input_ids")
            numbers.setdefault(int(match[1]), {})[match[2]] = name
        if not numbers:
            raise InputError(f"{path} holds no tensor; expected model inputs named <n>/<argument>")
        batches = []
        for number in _choose(sorted(numbers), samples, seed):
            inputs = {argument: file.read(name) for argument, name in numbers[number].items()}
            _check_ids(f"{path}: {number}/input_ids", inputs, limits)
            batches.append(Batch(inputs, _padding_mask(inputs), None))
    return batches


def _check_ids(where: str, inputs: Mapping[str, torch.Tensor], limits: Limits) -> None:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        return
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise InputError(f"{where}: {ids.dtype} {list(ids.shape)} found, expected integers of shape (batch, length)")
    if limits.positions is not None and ids.shape[1] > limits.positions:
        raise InputError(f"{where}: {ids.shape[1]} tokens long, but the model has {limits.positions} positions")
    if mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
        raise InputError(f"{where}: {list(ids.shape)} tokens, but the attention_mask has shape {list(mask.shape)}")
    limits.check_ids(where, int(ids.min()), int(ids.max()))


def _padding_mask(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()
