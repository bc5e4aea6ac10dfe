"""Samples of a downstream task as batches for a model.

A data file is JSONL, with `text`, `messages`, or `prompt` and `completion` in each record, and images for models that
read them; for a sequence classifier with `text`, `text_pair` where there are two, and `label`. Or it is a safetensors
file of ready model inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc_tools.data.image_samples import ImageReader
from emloc_tools.data.images import names_media
from emloc_tools.data.jsonl import blaming_line, choose, lines_of, read_records
from emloc_tools.data.ready_inputs import padding_mask, read_ready_inputs
from emloc_tools.data.samples import LabelledReader, Reader, S, Sample, TextReader
from emloc_tools.errors import InputError
from emloc_tools.models.diffusion import DiffusersConfig
from emloc_tools.models.labels import labels_of
from emloc_tools.models.limits import Limits, limits_of
from emloc_tools.models.processors import load_processor, load_tokenizer, reads_images
from emloc_tools.models.skeleton import load_config
from emloc_tools.models.source import Source

# Arguments that have a row for every sample. Others, such as the position ids of FLUX, have one for every token.
FIRST = ("input_ids", "hidden_states", "sample")


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of the model's forward; which tokens are real, and which are targets of a loss.

    `mask (batch, length)` is None where everything is real; `targets (batch, length)` is None for inputs without
    text samples. Both bool. `labels (batch,)` int64 are those of whole samples; then no token is a target. The tokens
    that stand for an image are real, and no targets; its pixels are read when `inputs` are asked for them.
    """

    inputs: Mapping[str, torch.Tensor]
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
    texts are cut at `max_length` tokens, and at the positions that the model has if those are fewer, but images never
    are. A sequence classifier takes a `label` of each record, or of none. `config` is the model's configuration where
    it is not that in the folder. Raises `InputError` naming the line or tensor at fault, also where token ids, labels
    or ready inputs do not fit the model.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected JSONL or a .safetensors file of model inputs")
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected JSONL or a .safetensors file of model inputs")
    if config is None:
        config = load_config(source, trust_remote_code=trust_remote_code)
    limits = limits_of(config)
    if path.suffix == ".safetensors":
        ready = read_ready_inputs(path, samples, seed, limits)
        return [Batch(inputs, padding_mask(inputs), None) for inputs in ready]
    if isinstance(config, DiffusersConfig):
        raise InputError(
            f"{path} is taken for JSONL, and {config.architecture} of diffusers reads no texts; give ready model "
            "inputs (.safetensors), which record-inputs writes"
        )
    lines = choose(list(lines_of(path)), samples, seed)
    if not lines:
        raise InputError(f"{path} holds no sample; expected one JSON object per line")
    records = list(read_records(path, lines))
    image_at = next((number for number, record in records if names_media(record)), None)
    if image_at is None:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        longest, labels = _longest(max_length, limits, tokenizer), labels_of(config)
        if labels is None:
            return _batches(path, records, TextReader(tokenizer, config, longest), limits, batch_size)
        return _batches(path, records, LabelledReader(tokenizer, config, longest, labels), limits, batch_size)
    if not reads_images(config):
        name = (config.architectures or ["the model"])[0]
        raise InputError(f"{path}:{image_at}: names an image or other media, but {name} reads text alone")
    processor = load_processor(source, config, trust_remote_code=trust_remote_code)
    longest = _longest(max_length, limits, processor.tokenizer)
    return _batches(path, records, ImageReader(path.parent, processor, config, longest), limits, batch_size)


def count_tokens(batches: Sequence[Batch]) -> int:
    """Real tokens in all batches; for inputs without token ids, their samples."""
    return sum(_tokens(batch) for batch in batches)


def count_samples(batches: Sequence[Batch]) -> int:
    """Samples in all batches: rows of token ids or hidden states; without those, the longest first dimension."""
    return sum(_samples(batch.inputs) for batch in batches)


def read_labels(path: Path) -> list[object]:
    """The `label` of every record of a JSONL file, as it stands there. Raises `InputError` for a record without."""
    if path.suffix == ".safetensors" or not path.is_file():
        raise InputError(f"{path} is no JSONL file; expected one object with `text` and `label` per line")
    found = []
    for number, record in read_records(path, list(lines_of(path))):
        if "label" not in record:
            raise InputError(f"{path}:{number}: found the keys {sorted(record)}, expected `text` and `label`")
        found.append(record["label"])
    return found


def _samples(inputs: Mapping[str, torch.Tensor]) -> int:
    for name in FIRST:
        if name in inputs:
            return inputs[name].shape[0]
    return max((tensor.shape[0] for tensor in inputs.values() if tensor.dim()), default=1)


def _tokens(batch: Batch) -> int:
    if batch.mask is not None:
        return int(batch.mask.sum())
    ids = batch.inputs.get("input_ids")
    return ids.numel() if ids is not None else _samples(batch.inputs)


def _longest(max_length: int | None, limits: Limits, tokenizer: Any) -> int | None:
    """Tokens that a sample may have, if there is a limit."""
    return min((limit for limit in (max_length, limits.of_texts(tokenizer)) if limit is not None), default=None)


def _batches(
    path: Path, records: Sequence[tuple[int, dict[str, Any]]], reader: Reader[S], limits: Limits, size: int
) -> list[Batch]:
    """The samples of numbered records, `size` of them in a batch."""
    samples = []
    for number, record in records:
        with blaming_line(path, number):
            samples.append(reader.encode(record))
        limits.check_ids(f"{path}:{number}", min(samples[-1].ids), max(samples[-1].ids))
    _require_all_or_none(path, [number for number, _ in records], samples)
    groups = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [
        Batch(inputs, None if bool(mask.all()) else mask, targets, labels)
        for inputs, mask, targets, labels in map(reader.collate, groups)
    ]


def _require_all_or_none(path: Path, lines: Sequence[int], samples: Sequence[Sample]) -> None:
    """A label is missing by mistake where other records have one."""
    missing = [line for line, sample in zip(lines, samples, strict=True) if sample.label is None]
    if missing and len(missing) < len(samples):
        raise InputError(f"{path}:{missing[0]}: has no `label`, although other records have one")
