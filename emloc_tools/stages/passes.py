"""How batches pass through a streamed model: the calls of its forward, and the room that a backward needs on disk."""

from __future__ import annotations

import contextlib
import inspect
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_tools.data.batches import Batch
from emloc_tools.data.ready_inputs import arguments_of
from emloc_tools.errors import InputError
from emloc_tools.files.ready_inputs import TARGET
from emloc_tools.models.source import first_line
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import Layer
from emloc_tools.streaming.stream import MAX_UNIT_BYTES
from emloc_tools.streaming.units import partition

PIXELS = "pixel_values"  # the argument of models that read images


def activation_bytes(model: Any, weights: ModelWeights, batches: Sequence[Batch]) -> int:
    """What a backward run writes to disk, at most about: tokens · hidden size · bytes of a number · (units + 2).

    Units are the model's blocks, and what lies around them (embeddings, last norm, head); padding counts as tokens do.
    The units of a vision tower hold its patches instead. 0 for a model that has no one hidden size.
    """
    units, _ = partition(model, weights, MAX_UNIT_BYTES)
    if isinstance(model.config, Mapping):  # of diffusers, whose tokens are those of the picture and of the text
        hidden, names = getattr(model, "inner_dim", 0), ("hidden_states", "encoder_hidden_states")
        given = [batch.inputs[name] for batch in batches for name in names if name in batch.inputs]
    else:
        hidden = getattr(model.config.get_text_config(), "hidden_size", 0)
        given = [next(iter(batch.inputs.values())) for batch in batches]
    tokens = sum(tensor.shape[:2].numel() for tensor in given)
    values = tokens * hidden * (len(units) + 2)
    vision = getattr(model.config, "vision_config", None)
    patch, width = getattr(vision, "patch_size", None), getattr(vision, "hidden_size", None)
    if patch and width:
        tower = sum("vision" in unit.name or "visual" in unit.name for unit in units)
        pixels = sum(batch.inputs[PIXELS].numel() for batch in batches if PIXELS in batch.inputs)
        side = patch if isinstance(patch, int) else patch[0]  # some configurations name both sides
        values += tower * (pixels // (3 * side**2) * width - tokens * hidden)
    return int(values * model.dtype.itemsize)


def require_room(folder: Path, output: Path, needed: int, *, fewer: str) -> None:
    """Refuse what a full disk would end late. `fewer` is the option that makes it need less."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"gradients need about {math.ceil(needed / 1e6):,} MB beside {output} for activations, and "
            f"{free // 10**6:,} MB are free there; choose fewer {fewer}, a shorter --max-length, or an --output on a "
            "larger disk"
        )


def sparing_options(model: Any, layers: Sequence[Layer], batches: Sequence[Batch], *, loss: bool) -> dict[str, Any]:
    """Arguments that spare what nobody needs: caches, and logits unless a loss or a Gram of the head is wanted.

    A model that is given labels computes its loss whether it is wanted or not.
    """
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    if loss:
        options["return_loss"] = True  # of pairs, such as of images and texts
    head = getattr(model, "get_output_embeddings", lambda: None)()
    has_loss = loss or any("labels" in batch.inputs for batch in batches)
    linears = [layer for layer in layers if layer.experts is None]
    if not has_loss and not any(model.get_submodule(layer.name) is head for layer in linears):
        options["logits_to_keep"] = 1
    return {name: value for name, value in options.items() if name in accepted}


def call_of(model: nn.Module, batch: Batch, device: torch.device, options: Mapping[str, Any]) -> Callable[[], Any]:
    """A call that runs one batch, with the `options` that its inputs do not set themselves."""

    def call() -> Any:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items() if name != TARGET}
        with blaming_inputs(model, inputs):
            return model(**{**options, **arguments_of(inputs)})

    return call


@contextlib.contextmanager
def blaming_inputs(model: nn.Module, inputs: Iterable[str]) -> Iterator[None]:
    """Turn a model's complaint about its arguments into a message that says which arguments it was given."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{type(model).__name__} cannot run on the inputs {', '.join(inputs)}: {first_line(error)}; a .safetensors "
            "file as --data can give any inputs"
        ) from error
