"""Data files of ready model inputs: safetensors with tensors named `<n>/<argument>`, for models of any kind.

An argument that is a dictionary of tensors has one named `<n>/<argument>.<key>` for each of its keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from emloc_tools.data.jsonl import choose
from emloc_tools.errors import FormatError, InputError
from emloc_tools.files.tensors import TensorFile
from emloc_tools.models.limits import Limits


def read_ready_inputs(path: Path, samples: int | None, seed: int, limits: Limits) -> list[dict[str, torch.Tensor]]:
    """The arguments of each n that is chosen. Raises `InputError` for a damaged file and for inputs that do not fit."""
    try:
        file = TensorFile(path)
    except FormatError as error:
        raise InputError(f"{error}; expected model inputs named <n>/<argument>") from error
    with closing(file):
        numbers: dict[int, dict[str, str]] = {}
        for name in file.specs():
            match = re.fullmatch(r"(0|[1-9]\d*)/(\w+(?:\.\w+)?)", name)
            if match is None:
                raise InputError(f"{path}: the tensor {name!r} is not named <n>/<argument>, such as 0/input_ids")
            numbers.setdefault(int(match[1]), {})[match[2]] = name
        if not numbers:
            raise InputError(f"{path} holds no tensor; expected model inputs named <n>/<argument>")
        for number, arguments in numbers.items():
            twice = next((name for name in arguments if "." in name and name.partition(".")[0] in arguments), None)
            if twice is not None:
                outer = twice.partition(".")[0]
                raise InputError(
                    f"{path}: {number}/{outer} and {number}/{twice}; an argument is a tensor or a dictionary"
                )
        found = []
        for number in choose(sorted(numbers), samples, seed):
            inputs = {argument: file.read(name) for argument, name in numbers[number].items()}
            _check_ids(f"{path}: {number}/input_ids", inputs, limits)
            found.append(inputs)
    return found


def arguments_of(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Keyword arguments of a model: tensors, and dictionaries of those whose names have two parts."""
    arguments: dict[str, Any] = {}
    for name, tensor in inputs.items():
        outer, _, key = name.partition(".")
        if key:
            arguments.setdefault(outer, {})[key] = tensor
        else:
            arguments[name] = tensor
    return arguments


def padding_mask(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Which tokens are real, `(batch, length)`, bool; None where the inputs have no padding, or do not tell."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


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
