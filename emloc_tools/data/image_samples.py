"""Records with images as samples: encoded and put into batches by the base's own processor.

The processor puts as many placeholder tokens in the text as the image has features; the model replaces them. All of
them are tokens of the sample, and none is a target of a loss.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc_tools.data.chats import texts_of
from emloc_tools.data.images import open_image, places_in, take_images
from emloc_tools.data.samples import Collated, Sample, common_prefix
from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.processors import placeholders


@dataclass(frozen=True, kw_only=True)
class ImageSample(Sample):
    """A record ready for the processor, and what that makes of it.

    `text` has a mark for each of `images`, which are paths; `special` says whether special tokens are to be added.
    `ids` are the tokens with the placeholders of the images; `arguments` the names of all model inputs.
    """

    text: str
    special: bool
    images: tuple[str, ...]
    arguments: tuple[str, ...]


class ImageInputs(Mapping[str, torch.Tensor]):
    """Model inputs of which only `input_ids` are in memory: the others are made anew from the files at every use.

    The pixels of one image are several megabytes as the model takes them; a data file may name thousands.
    """

    def __init__(self, ids: torch.Tensor, others: Sequence[str], make: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._ids, self._others, self._make = ids, tuple(others), make

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "input_ids":
            return self._ids
        if name in self._others:
            return self._make()[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from ("input_ids", *self._others)

    def __len__(self) -> int:
        return 1 + len(self._others)

    def items(self) -> ItemsView[str, torch.Tensor]:
        """All inputs, made at once."""
        return self._make().items()


class ImageReader:
    """Encodes records of a data file in `folder` with the processor of a model that reads images.

    Samples are cut at `longest` tokens, but never before the end of their last image.
    """

    def __init__(self, folder: Path, processor: Any, config: Any, longest: int | None) -> None:
        self._folder, self._processor, self._longest = folder, processor, longest
        self._placeholders = placeholders(config, processor)

    def encode(self, record: Mapping[str, Any]) -> ImageSample:
        """The sample of a record. Raises `InputError`, `ValueError` or `TypeError` for a bad one."""
        written, images = take_images(record)
        texts = texts_of(written, self._processor)
        found = self._process([texts.whole], [images], texts.special)
        if "labels" in found:
            raise ValueError(
                f"{type(self._processor).__name__} tells questions from answers by itself, not by a conversation; a "
                ".safetensors file as --data can give model inputs that are ready"
            )
        ids = found["input_ids"][0].tolist()
        if images and self._placeholders and self._placeholders.isdisjoint(ids):
            raise ValueError(f"the record names {len(images)} images, and its text has no place for one")
        start = 0
        if texts.prompt:
            asked = images[: places_in(written["prompt"], len(images))]
            prompt = self._process([texts.prompt], [asked], texts.special)["input_ids"][0]
            start = common_prefix(prompt.tolist(), ids)
        return ImageSample(
            ids=ids[: self._size(ids, len(images))],
            loss_from=start,
            text=texts.whole,
            special=texts.special,
            images=tuple(images),
            arguments=tuple(found),
        )

    def collate(self, samples: Sequence[ImageSample]) -> Collated:
        """A batch of samples, padded on the right. Raises `InputError` for samples that cannot share one."""
        if len({sample.special for sample in samples}) > 1:
            raise InputError("conversations and plain texts cannot share a batch with images; use --batch-size 1")
        pad = self._processor.tokenizer.pad_token_id
        if pad is None and len(samples) > 1:
            raise InputError("the base's tokenizer has no padding token; use --batch-size 1")
        length = max(len(sample.ids) for sample in samples)
        ids = torch.full((len(samples), length), pad or 0)
        mask = torch.zeros(len(samples), length, dtype=torch.bool)
        targets = torch.zeros_like(mask)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
            mask[row, : len(sample.ids)] = True
            targets[row, sample.loss_from : len(sample.ids)] = True
        targets &= ~torch.isin(ids, torch.tensor(sorted(self._placeholders)))
        names = dict.fromkeys(name for sample in samples for name in sample.arguments if name != "input_ids")
        return ImageInputs(ids, list(names), lambda: self._inputs(samples, ids)), mask, targets, None

    def _inputs(self, samples: Sequence[ImageSample], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the processor makes of a batch, cut to the length of `ids (batch, length)`."""
        found = self._process(
            [sample.text for sample in samples], [sample.images for sample in samples], samples[0].special
        )
        whole, length = found["input_ids"].shape, ids.shape[1]
        if whole[1] > length:
            of_tokens = [name for name, tensor in found.items() if tensor.shape[:2] == whole]
            found |= {name: found[name][:, :length] for name in of_tokens}
        if not torch.equal(found["input_ids"], ids):
            raise UnsupportedError(
                f"{type(self._processor).__name__} gives samples of a batch other tokens than each alone; use "
                "--batch-size 1"
            )
        return found

    def _process(self, texts: Sequence[str], images: Sequence[Sequence[str]], special: bool) -> dict[str, torch.Tensor]:
        opened = [[open_image(self._folder, name) for name in names] for names in images]
        try:
            found = self._processor(
                text=list(texts),
                images=opened if any(opened) else None,
                add_special_tokens=special,
                padding=len(texts) > 1,
                padding_side="right",
                return_tensors="pt",
            )
        except StopIteration as error:  # in releases of transformers that do not count before
            raise ValueError("the text has places for more images than the record names") from error
        return dict(found)

    def _size(self, ids: Sequence[int], images: int) -> int:
        """How many tokens of a sample with so many images are kept."""
        if not ids:
            raise ValueError("the text is empty")
        if self._longest is None or len(ids) <= self._longest:
            return len(ids)
        places = [place for place, token in enumerate(ids, 1) if token in self._placeholders]
        end = max(places, default=len(ids)) if images else 0
        if end > self._longest:
            raise ValueError(
                f"{len(ids)} tokens, and the last of {images} images ends at token {end}; images are not cut, and "
                f"--max-length or the model allow {self._longest}: raise --max-length, shrink the images or leave the "
                "record out"
            )
        return self._longest
