"""The fit of a head on features: which samples it is fitted on, what is minimised, and how good it then is.

The weight decay decides what a LoRA can learn later: a head that knows its samples by heart leaves no loss, and so no
gradient, for it. What is best on other samples is found by cross-validation, which costs little on stored features.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from emloc_tools.errors import InputError
from emloc_tools.linalg.minimum import Minimum, minimise
from emloc_tools.streaming.head_features import Features, Head

DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # that are tried, the strongest first
FOLDS = 5
ROUGH: dict[str, Any] = {"tolerance": 1e-3, "rounds": 1}  # where only the loss on other samples is wanted


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


def cross_validated(head: Head, features: Features, wanted: torch.Tensor, seed: int) -> dict[float, float]:
    """The mean loss of each of `DECAYS` on samples that were left out of the fit, each once; the head stays as it is.

    `seed` deals the samples of every label into `FOLDS` parts, or as many as the most frequent label has. Empty where
    no label has two samples.
    """
    start = {name: parameter.detach().clone() for name, parameter in head.parameters.items()}
    part = _dealt(wanted.tolist(), seed).to(wanted.device)
    sums = dict.fromkeys(DECAYS, 0.0)
    for left_out in range(1 + int(part.max())):
        own, other = (part != left_out).nonzero()[:, 0], (part == left_out).nonzero()[:, 0]
        if not len(own):
            return {}
        head.set(start)
        seen, unseen = features.select(own), features.select(other)
        for decay in DECAYS:  # each starts from the one before
            fit(head, seen, wanted[own], decay, **ROUGH)
            sums[decay] += quality(head, unseen, wanted[other]).loss * len(other)
    head.set(start)
    return {decay: total / len(wanted) for decay, total in sums.items()}


def _dealt(wanted: Sequence[int], seed: int) -> torch.Tensor:
    """The part of every sample: those of a label, in random order, one after the other."""
    order = list(range(len(wanted)))
    random.Random(seed).shuffle(order)
    dealt: Counter[int] = Counter()
    part = torch.zeros(len(wanted), dtype=torch.int64)
    for place in order:
        part[place] = dealt[wanted[place]] % FOLDS
        dealt[wanted[place]] += 1
    return part


def fit(head: Head, features: Features, wanted: torch.Tensor, weight_decay: float, **precision: Any) -> Minimum:
    """Change the head, in place, such that the mean cross-entropy of the labels `wanted (samples,)` is least.

    `weight_decay / 2` times the squared entries of the head's matrices is added to it. `precision` is that of
    `minimise`.
    """
    parameters = list(head.parameters.values())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]

    def objective() -> torch.Tensor:
        loss = F.cross_entropy(head.logits(features), wanted)
        return loss + weight_decay / 2 * sum((matrix.square().sum() for matrix in matrices), torch.zeros_like(loss))

    return minimise(objective, parameters, **precision)


def quality(head: Head, features: Features, wanted: torch.Tensor) -> Quality:
    """What the head makes of samples with the labels `wanted (samples,)`."""
    with torch.no_grad():
        logits = head.logits(features).double()
    accuracy = float((logits.argmax(-1) == wanted).double().mean())
    return Quality(float(F.cross_entropy(logits, wanted)), accuracy, len(wanted))
