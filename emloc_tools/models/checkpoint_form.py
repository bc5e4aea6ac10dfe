"""From model tensors to checkpoint tensors: the inverse of `weights`, for a model that stock classes are to load.

transformers holds some models otherwise than their checkpoints do (renamed keys, experts fused into one tensor), and
undoes that when it saves. Its own inverse rules are applied here, one tensor at a time. These are internals of
transformers: they are used in this file and in `weights` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.tensors import TensorSpec


def checkpoint_form(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint of `model` holds in place of some of its tensors; views of them where that suffices."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def plan_checkpoint(model: Any, specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The checkpoint tensors of all model tensors, in their order, from names, dtypes and shapes alone.

    Raises `UnsupportedError` for a model of which several tensors become one in its checkpoint: they would have to be
    in memory together.
    """
    on_meta = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
    one_by_one = [spec for name, tensor in on_meta.items() for spec in _specs(checkpoint_form(model, {name: tensor}))]
    together = _specs(checkpoint_form(model, on_meta))
    if set(one_by_one) != set(together) or len(one_by_one) != len(together):
        differing = set(one_by_one) ^ set(together) or set(one_by_one)
        raise UnsupportedError(
            f"{type(model).__name__} joins several of its tensors in its checkpoint, such as those of "
            f"{min(spec.name for spec in differing)}, which a dense export cannot do; train on the emulator as it is"
        )
    return one_by_one


def _specs(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
