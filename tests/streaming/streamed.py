"""What the tests of this room share: batches, models in memory, and the same models streamed from their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.base import open_base
from emloc_tools.models.skeleton import parameters_on_meta
from emloc_tools.models.weights import ModelWeights
from emloc_tools.streaming.stream import MAX_UNIT_BYTES, LockStep
from tests import pico

Inputs = Mapping[str, torch.Tensor]


def batches() -> list[dict[str, torch.Tensor]]:
    """Four batches of different shapes; the second is padded on the right, the fourth on the left."""
    generator = torch.Generator().manual_seed(1)
    made: list[dict[str, torch.Tensor]] = []
    for rows, length in ((2, 11), (2, 9), (1, 6), (3, 14)):
        made.append({"input_ids": torch.randint(4, pico.VOCABULARY, (rows, length), generator=generator)})
    for index, padding in ((1, slice(-4, None)), (3, slice(0, 5))):
        mask = torch.ones_like(made[index]["input_ids"])
        mask[0, padding] = 0
        made[index]["attention_mask"] = mask
    return made


def in_memory(folder: Path) -> Any:
    """The model as transformers loads it."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def outputs(model: Any, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Logits and all hidden states."""
    with torch.no_grad():
        result = model(**inputs, output_hidden_states=True)
    return (result.logits, *result.hidden_states)


def open_stream(folder: Path, max_unit_bytes: int = MAX_UNIT_BYTES) -> LockStep:
    """A saved transformers model, ready to stream."""
    opened = open_base(str(folder))
    return LockStep(opened.model, opened.weights(), max_unit_bytes=max_unit_bytes)


def stream_outputs(stream: LockStep, made: list[dict[str, torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
    """Logits and all hidden states of every batch, in one run."""
    results: dict[int, tuple[torch.Tensor, ...]] = {}
    calls = [lambda inputs=inputs: outputs(stream.model, inputs) for inputs in made]
    stream.run(calls, results.__setitem__)
    return [results[index] for index in range(len(made))]


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, read by the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all tensors of a checkpoint folder."""
    return sum(tensor.nbytes for tensor in checkpoint(folder).values())


def stream_module(make: type[nn.Module], folder: Path) -> tuple[nn.Module, LockStep]:
    """A plain module in memory with random weights, and the same one streamed from a file."""
    reference = make()
    save_file(reference.state_dict(), folder / "model.safetensors")
    with parameters_on_meta():
        skeleton = make()
    tensors = TensorFolder.of_files([folder / "model.safetensors"])
    return reference, LockStep(skeleton, ModelWeights(skeleton, tensors))
