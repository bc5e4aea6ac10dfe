"""The labels of a sequence classifier: which label of a record is which row of the model's logits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from emloc_tools.errors import InputError

SHOWN = 8  # labels in a message


def classifies_sequences(architecture: str) -> bool:
    """Whether a model class of transformers gives one label to a whole text."""
    from transformers.models.auto import modeling_auto

    return architecture in set(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())


def labels_of(config: Any) -> dict[str, int] | None:
    """The labels that the configuration of a sequence classifier names, with their ids; None for other models.

    An emulator's configuration counts as that of the model it stands for. Empty for a classifier that gives a number,
    or several labels, to a text: no one label is right there.
    """
    name = (getattr(config, "architectures", None) or [""])[0].removeprefix("Emloc")
    if not classifies_sequences(name):
        return None
    if config.num_labels == 1 or config.problem_type in ("regression", "multi_label_classification"):
        return {}
    return {str(label): int(number) for label, number in config.label2id.items()}


def label_id(label: object, known: Mapping[str, int]) -> int:
    """The id of a record's label: by its name, or a whole number that is an id itself. Raises ValueError for others."""
    if not known:
        raise ValueError("has a `label`, but by its config.json the model gives a number, or several labels, to a text")
    if _is_label(label):
        if str(label) in known:
            return known[str(label)]
        if isinstance(label, int) and label in known.values():
            return label
    raise ValueError(f"`label` is {label!r}, expected one of {shown(known)}")


def trained_head(model: Any, tensors: Iterable[str]) -> list[str]:
    """The modules of a sequence classifier's head that the tensors of a PEFT adapter change or replace, sorted.

    A head is what lies outside of the model's body, and the body's pooler. None of another model counts as one.
    """
    if not classifies_sequences(type(model).__name__):
        return []
    modules = {re.sub(r"(\.lora_[AB])?\.\w+$", "", name.removeprefix("base_model.model.")) for name in tensors}
    return sorted(name for name in modules if is_of_head(name, model.base_model_prefix))


def is_of_head(name: str, body: str) -> bool:
    """Whether a module or tensor may belong to a head: it lies outside of the model's `body`, or in its pooler."""
    return not name.startswith(f"{body}.") or name.startswith(f"{body}.pooler.")


def numbered(labels: Iterable[object]) -> dict[str, int]:
    """Ids for the labels that occur, sorted: as numbers if all of them are, else as texts.

    Raises ValueError for what is neither a text nor a whole number, `InputError` for fewer than two different ones.
    """
    found = list(labels)
    for label in found:
        if not _is_label(label):
            raise ValueError(f"`label` is {label!r}, expected a text or a whole number")
    numbers = [label for label in found if isinstance(label, int)]
    names = [str(n) for n in sorted(set(numbers))] if len(numbers) == len(found) else sorted(set(map(str, found)))
    if len(names) < 2:
        raise InputError(f"the data hold only the label {', '.join(names) or 'none'}; a head needs two or more")
    return {name: number for number, name in enumerate(names)}


def shown(known: Iterable[str]) -> str:
    """Labels in one line."""
    names = list(known)
    more = f", … ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def _is_label(label: object) -> bool:
    return isinstance(label, (str, int)) and not isinstance(label, bool)
