"""A base with a new head for sequence classification: the class it becomes, and what the checkpoint lacks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from emloc_tools.errors import InputError, MismatchError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.labels import is_of_head
from emloc_tools.models.processors import load_tokenizer
from emloc_tools.models.skeleton import build_skeleton, compute_dtype, load_config, model_class
from emloc_tools.models.source import Source, open_source, open_tensors
from emloc_tools.models.weights import ModelWeights


@dataclass(frozen=True)
class HeadedBase:
    """A base as a sequence classifier. The tensors `head` of `model` are random, all others are on meta.

    `original` is the class that config.json names. `tokenizer_pads` says whether the tokenizer pads with what the
    configuration names as padding.
    """

    source: Source
    config: Any
    original: str
    architecture: str
    model: nn.Module
    tensors: TensorFolder
    weights: ModelWeights
    head: tuple[str, ...]
    tokenizer_pads: bool


def open_headed(
    base: str,
    labels: Mapping[str, int],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> HeadedBase:
    """Open a base as the sequence classifier of its kind. `seed` chooses the random head.

    Raises `UnsupportedError` for a base without such a class, `InputError` for one that has its head already,
    `MismatchError` for one that lacks more than a head.
    """
    source = open_source(base, revision=revision, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    original = model_class(config, source, trust_remote_code=trust_remote_code).__name__
    cls = _headed_class(config, source)
    pads = _describe_labels(config, cls.__name__, labels, load_tokenizer(source, trust_remote_code=trust_remote_code))
    model = build_skeleton(cls, config, dtype=compute_dtype(config, dtype))
    tensors = open_tensors(source)
    weights = ModelWeights(model, tensors, may_lack=lambda name: is_of_head(name, str(model.base_model_prefix)))
    if not weights.missing:
        tensors.close()
        raise InputError(
            f"{source.id} has every tensor of {cls.__name__}, so it has a head already; pass it as --base as it is"
        )
    _initialise(model, weights.missing, seed, device)
    return HeadedBase(source, config, original, cls.__name__, model, tensors, weights, tuple(weights.missing), pads)


def _headed_class(config: Any, source: Source) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    try:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedError(
            f"{source.id}: transformers has no model for sequence classification of the type {config.model_type}"
        ) from None


def _describe_labels(config: Any, architecture: str, labels: Mapping[str, int], tokenizer: Any) -> bool:
    """Make a configuration, in place, that of the classifier; whether the tokenizer pads with its padding."""
    config.architectures = [architecture]
    config.id2label = {number: label for label, number in labels.items()}
    config.label2id = dict(labels)
    config.problem_type = "single_label_classification"
    text = config.get_text_config()
    if text.pad_token_id is None:
        own = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if own is None:
            raise InputError(
                "neither config.json nor the tokenizer names a padding or an end token, by which a classifier finds "
                "the last token of a text; add pad_token_id to config.json"
            )
        text.pad_token_id = own
    return bool(tokenizer.pad_token_id == text.pad_token_id)


def _initialise(model: nn.Module, missing: Sequence[str], seed: int, device: str) -> None:
    """Give missing parameters the start that torch gives modules of their kind."""
    owners: dict[str, list[str]] = {}
    for name in missing:
        owner, _, attribute = name.rpartition(".")
        owners.setdefault(owner, []).append(attribute)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, attributes in owners.items():
            module = model.get_submodule(name)
            own = {attribute for attribute, value in module._parameters.items() if value is not None}
            if own != set(attributes):
                raise MismatchError(f"the checkpoint holds only {', '.join(own - set(attributes))} of {name}")
            if not hasattr(module, "reset_parameters"):
                raise UnsupportedError(f"{name} is a {type(module).__name__}, of which a start is not known")
            for attribute in attributes:
                placeholder = cast(nn.Parameter, module._parameters[attribute])
                module._parameters[attribute] = nn.Parameter(torch.empty_like(placeholder, device="cpu"))
            cast(Any, module).reset_parameters()
            for attribute in attributes:
                start = cast(nn.Parameter, module._parameters[attribute])
                module._parameters[attribute] = nn.Parameter(start.detach().to(device))
