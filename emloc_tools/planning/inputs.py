"""Inputs of a training step that a plan is made for: tensors of the right shapes; values matter only where models look.

Floating-point inputs have the model's dtype. A loss is computed of `labels`, where the model takes some.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from emloc_tools.data.batches import load_batches
from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.ready_inputs import TARGET
from emloc_tools.models.diffusion import DiffusersConfig
from emloc_tools.models.labels import classifies_sequences
from emloc_tools.models.processors import load_processor, placeholders, reads_images, require_pillow
from emloc_tools.models.source import Source
from emloc_tools.planning.denoisers import denoiser_inputs

Inputs = dict[str, Any]  # tensors, or dictionaries of tensors

PREPROCESSOR = "preprocessor_config.json"
FRAMES = 3000  # of Whisper's spectrograms: 30 seconds


@dataclass(frozen=True)
class Shape:
    """What a step's inputs look like.

    `batch_size` samples of `length` tokens each, `images` of `image_size` (height, width) in pixels among them; for
    denoisers of diffusers, pictures of `resolution` (height, width) described by `length` tokens. `data` is a file of
    samples instead, of which the largest batch counts.
    """

    batch_size: int = 1
    length: int = 2048
    images: int = 0
    image_size: tuple[int, int] = (448, 448)
    resolution: tuple[int, int] = (1024, 1024)
    data: Path | None = None


def make_inputs(
    model: nn.Module, config: Any, source: Source, shape: Shape, *, trust_remote_code: bool = False
) -> Inputs:
    """Keyword arguments of the model's forward. Raises `InputError` or `UnsupportedError` where none can be made."""
    if shape.data is not None:
        return _of_data(model, config, source, shape, trust_remote_code)
    if isinstance(config, DiffusersConfig):
        return denoiser_inputs(model, config, shape.batch_size, shape.length, shape.resolution)
    if shape.images:
        if not reads_images(config):
            raise InputError(f"--images {shape.images}: {type(model).__name__} reads text alone; leave it out")
        found = _with_images(model, config, source, shape, trust_remote_code)
    else:
        found = _plain(model, config, shape)
    return _with_labels(model, config, found)


def _plain(model: Any, config: Any, shape: Shape) -> Inputs:
    """Texts, or one image or one recording per sample, for models that read nothing else."""
    name = getattr(model, "main_input_name", "input_ids")
    accepted = inspect.signature(model.forward).parameters
    if name == "input_ids" or "input_ids" in accepted:
        ids = torch.full((shape.batch_size, shape.length), _filler(config))
        mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in accepted else {}
        return {"input_ids": ids, **mask}
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {name: torch.zeros(shape.batch_size, channels, height, width, dtype=model.dtype)}
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        found = {name: torch.zeros(shape.batch_size, config.num_mel_bins, FRAMES, dtype=model.dtype)}
        if "decoder_input_ids" in accepted:
            length = min(shape.length, getattr(config, "max_target_positions", shape.length))
            found["labels"] = torch.full((shape.batch_size, length), _filler(config))
        return found
    raise UnsupportedError(
        f"{type(model).__name__} takes {name}, of which the shape is not known here; give --data with samples or ready "
        "model inputs (.safetensors)"
    )


def _with_images(model: Any, config: Any, source: Source, shape: Shape, trust_remote_code: bool) -> Inputs:
    """Texts with blank images, filled up to the length: by the base's processor, else by what its config tells."""
    if (source.folder / PREPROCESSOR).is_file():
        found = _processed(config, source, shape, trust_remote_code)
    else:
        found = _tiles(model, config, shape)
    return {key: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for key, tensor in found.items()}


def _processed(config: Any, source: Source, shape: Shape, trust_remote_code: bool) -> Inputs:
    """What the processor makes of blank images in one message."""
    require_pillow()
    from PIL import Image

    processor = load_processor(source, config, trust_remote_code=trust_remote_code)
    height, width = shape.image_size
    image = Image.new("RGB", (width, height))
    content = [*({"type": "image"} for _ in range(shape.images)), {"type": "text", "text": "?"}]
    if getattr(processor, "chat_template", None):
        text = processor.apply_chat_template([{"role": "user", "content": content}])
    else:
        text = getattr(processor, "image_token", "<image>") * shape.images
    found = dict(
        processor(
            text=[text] * shape.batch_size,
            images=[[image] * shape.images] * shape.batch_size,
            add_special_tokens=False,
            return_tensors="pt",
        )
    )
    places = placeholders(config, processor)
    return _filled(found, shape, next(token for token in range(3, 1000) if token not in places))


def _tiles(model: Any, config: Any, shape: Shape) -> Inputs:
    """InternVL and models like it: every image is a square tile that becomes a fixed number of tokens."""
    tokens, token = getattr(config, "image_seq_length", None), getattr(config, "image_token_id", None)
    size = getattr(config.vision_config, "image_size", None)
    if tokens is None or token is None or size is None:
        raise UnsupportedError(
            f"{type(model).__name__} needs its processor ({PREPROCESSOR}) for --images; or give --data with "
            "samples or ready model inputs (.safetensors)"
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    ids = torch.full((shape.batch_size, shape.images * tokens), token)
    pixels = torch.zeros(shape.batch_size * shape.images, 3, height, width)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return _filled(found, shape, _filler(config))


def _filled(found: Mapping[str, Any], shape: Shape, filler: int) -> Inputs:
    """Text after the images, up to the length that was asked for."""
    whole = found["input_ids"].shape
    missing = shape.length - whole[1]
    if missing < 0:
        raise InputError(
            f"--images {shape.images} and the text around them take {whole[1]:,} tokens, more than --sequence-length "
            f"{shape.length:,}; raise it, or choose fewer or smaller images"
        )
    values = {"input_ids": filler, "attention_mask": 1}
    filled: Inputs = {}
    for name, tensor in found.items():
        if isinstance(tensor, torch.Tensor):
            is_of_tokens = tensor.shape[:2] == whole and tensor.dim() == 2
            more = tensor.new_full((whole[0], missing), values.get(name, 0)) if is_of_tokens else None
            filled[name] = tensor if more is None else torch.cat([tensor, more], dim=1)
    return filled


def _of_data(model: Any, config: Any, source: Source, shape: Shape, trust_remote_code: bool) -> Inputs:
    """The largest batch of a data file."""
    assert shape.data is not None  # asked for
    batches = load_batches(
        shape.data,
        source,
        samples=None,
        max_length=shape.length,
        batch_size=shape.batch_size,
        seed=0,
        trust_remote_code=trust_remote_code,
    )
    largest = max(batches, key=lambda batch: sum(tensor.numel() for tensor in tree_leaves(dict(batch.inputs.items()))))
    given = {name: value for name, value in largest.inputs.items() if name != TARGET}
    found: Inputs = tree_map(lambda tensor: tensor.to(model.dtype) if tensor.is_floating_point() else tensor, given)
    if largest.labels is not None:
        return {**found, "labels": largest.labels}
    return _with_labels(model, config, found)


def _with_labels(model: Any, config: Any, inputs: Inputs) -> Inputs:
    """The inputs with labels such as a trainer gives, if the model takes them and they are not there yet."""
    if "labels" in inputs or "labels" not in inspect.signature(model.forward).parameters:
        return inputs
    if "input_ids" not in inputs or classifies_sequences(type(model).__name__):
        rows: Sequence[int] = tree_leaves(inputs)[0].shape[:1]
        return {**inputs, "labels": torch.zeros(rows, dtype=torch.long)}
    return {**inputs, "labels": inputs["input_ids"].clone()}


def _filler(config: Any) -> int:
    """A token of plain text: none that the configuration gives a meaning of its own."""
    text = config.get_text_config()
    special = {
        value
        for holder in (config, text)
        for name, value in vars(holder).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    return next(token for token in range(len(special) + 1) if token not in special)
