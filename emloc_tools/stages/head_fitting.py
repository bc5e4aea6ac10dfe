"""The fit of a head on features: which samples it is fitted on, what is minimised, and how good it then is."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from emloc_tools.errors import InputError
from emloc_tools.linalg.minimum import Minimum, minimise
from emloc_tools.models.head_features import Features, Head

WEIGHT_DECAY = 1e-3


@dataclass(frozen=True)
class Quality:
    """Mean loss in nats per sample, and the part of samples whose label is the likeliest."""

    loss: float
    accuracy: float
    samples: int


def split(
    wanted: Sequence[int], labels: Mapping[str, int], part: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of the samples to fit, and of those held out: `part` of every label, rounded down, by `seed`.

    Raises `InputError` for a label of which no sample was chosen.
    """
    held: set[int] = set()
    for name, number in labels.items():
        own = [place for place, label in enumerate(wanted) if label == number]
        if not own:
            raise InputError(f"none of the {len(wanted)} chosen samples has the label {name!r}; choose more --samples")
        held |= set(random.Random(seed).sample(own, int(part * len(own))))
    chosen = [place for place in range(len(wanted)) if place not in held]
    return torch.tensor(chosen), torch.tensor(sorted(held), dtype=torch.int64)


def fit(head: Head, features: Features, wanted: torch.Tensor, weight_decay: float) -> Minimum:
    """Change the head, in place, such that the mean cross-entropy of the labels `wanted (samples,)` is least.

    `weight_decay / 2` times the squared entries of the head's matrices is added to it.
    """
    parameters = list(head.parameters.values())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]

    def objective() -> torch.Tensor:
        loss = F.cross_entropy(head.logits(features), wanted)
        return loss + weight_decay / 2 * sum((matrix.square().sum() for matrix in matrices), torch.zeros_like(loss))

    return minimise(objective, parameters)


def quality(head: Head, features: Features, wanted: torch.Tensor) -> Quality:
    """What the head makes of samples with the labels `wanted (samples,)`."""
    with torch.no_grad():
        logits = head.logits(features).double()
    accuracy = float((logits.argmax(-1) == wanted).double().mean())
    return Quality(float(F.cross_entropy(logits, wanted)), accuracy, len(wanted))
