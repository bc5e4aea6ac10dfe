"""Which Auto classes of transformers can load an emulator: those whose model class finds its blocks in the files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from emloc_tools.models.layers import in_block


@dataclass(frozen=True)
class Fitting:
    """A model class that can load an emulator, and the beginnings of the names of factored layers that it lacks.

    A class may have a part of the model only, such as a decoder without its encoder.
    """

    name: str
    lacks: tuple[str, ...] = ()


def fitting_classes(config: Any, layers: Collection[str], stored: Collection[str]) -> dict[str, Fitting]:
    """The class of every Auto class that knows the configuration and can load the emulator.

    `layers` are the factored layers, `stored` the names of the base's tensors, both in the base's class. A class fits
    if it has one of the layers at least and lacks no tensor of a block; its own head it may make anew, as for the base.
    Some classes call the body by another name (LlamaForQuestionAnswering), and then find no tensor of the checkpoint.
    """
    found: dict[str, Fitting | None] = {}
    chosen = dict(_candidates(config))
    for name in set(chosen.values()):
        found[name] = _fit(name, config, layers, stored)
    return {auto: fitting for auto, name in chosen.items() if (fitting := found[name]) is not None}


def _candidates(config: Any) -> Iterator[tuple[str, str]]:
    """Every Auto class that knows the configuration, with the name of the model class that it gives."""
    from transformers.models.auto import modeling_auto

    for auto, cls in sorted(vars(modeling_auto).items()):
        mapping = getattr(cls, "_model_mapping", None) if auto.startswith("AutoModel") else None
        if mapping is not None and type(config) in mapping:
            chosen = mapping[type(config)]
            yield auto, (chosen[0] if isinstance(chosen, (list, tuple)) else chosen).__name__


def _fit(name: str, config: Any, layers: Collection[str], stored: Collection[str]) -> Fitting | None:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None or cls.from_pretrained.__func__ is not transformers.PreTrainedModel.from_pretrained.__func__:
        return None  # in a mapping, but not public; or with a loader of its own, which wants other files as well
    with torch.device("meta"), warnings.catch_warnings():  # only names are wanted; so buffers may be there as well
        warnings.simplefilter("ignore")
        model = cls._from_config(copy.deepcopy(config), dtype=torch.float32)
    prefix = f"{cls.base_model_prefix}."
    has = {*dict(model.named_modules()), *dict(model.named_parameters())}
    present = {layer for layer in layers if not has.isdisjoint(_spellings(layer, prefix))}
    names = set(stored)
    wanting = [key for key, _ in model.named_parameters() if names.isdisjoint(_spellings(key, prefix))]
    if not present or any(in_block(model, key) for key in wanting):
        return None
    return Fitting(name, _beginnings(set(layers) - present, present))


def _spellings(name: str, prefix: str) -> tuple[str, str]:
    """A name in a class with a head, and in one without: transformers takes either for the other."""
    return name, name[len(prefix) :] if name.startswith(prefix) else prefix + name


def _beginnings(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The shortest beginnings, up to a dot, that all of `names` have and none of `others`."""
    found: set[str] = set()
    for name in names:
        parts = f"{name}.".split(".")
        starts = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
        found.add(next(start for start in starts if not any(f"{other}.".startswith(start) for other in others)))
    return tuple(sorted(found))
