"""Choose between LoRAs by their losses on held-out samples, and know what so few samples can tell.

The rule. The corrected LoRA at scale 1 is what the method gives, so it stays unless the samples speak against it:
another candidate replaces it only if its mean loss per token is lower by more than the standard error of that
difference. Of several such candidates the one with the lowest loss is chosen. The difference is *paired*: both losses
are of the same samples, so what makes a sample easy or hard for every candidate cancels, and differences far below the
standard error of the loss itself can be told.

Samples have different lengths, and a longer one says more. With losses `l_i` summed over the `n_i` tokens of sample i
of m, the mean per token `L = Σ l_i / Σ n_i` is a ratio of sums, whose standard error is, to first order,
`√(m/(m−1) · Σ (l_i − L n_i)²) / Σ n_i`; at equal lengths this is the textbook's `s / √m`. Tokens of one sample depend
on each other, which is why samples are counted and not tokens.

The loss of the chosen candidate is a little too good, as it is the best of several on these very samples: judge the
result on others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from emloc_tools.files.manifest import Candidate, DataRecord, Selection
from emloc_tools.models.lora import LoraPair

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)  # of every B; small ones win where emulator and base are far apart
LEAST_SAMPLES = 2  # a standard error needs as many


@dataclass(frozen=True)
class Tried:
    """A candidate before it is measured: whose pairs, and the scale of their B. `none` has scale 0."""

    adapter: Literal["none", "trained", "corrected"]
    scale: float


NONE, REFERENCE = Tried("none", 0.0), Tried("corrected", 1.0)


@dataclass(frozen=True)
class HeldOut:
    """What the base makes of held-out samples without a LoRA and with several.

    `data` counts the predicted tokens and the samples that hold any. `chosen` is a place in `candidates`, and None
    where nothing was to be chosen; it is that of `none` where no LoRA helps. By `predicts` a label of a sample counts
    as a token.
    """

    data: DataRecord
    candidates: list[Candidate]
    chosen: int | None
    predicts: Literal["tokens", "labels"] = "tokens"

    @property
    def winner(self) -> Tried | None:
        """What was chosen, if anything was to be."""
        if self.chosen is None:
            return None
        candidate = self.candidates[self.chosen]
        return Tried(candidate.adapter, candidate.scale)

    @property
    def none_wins(self) -> bool:
        """Whether a choice was made, and fell on no LoRA at all."""
        return self.winner == NONE

    @property
    def selection(self) -> Selection | None:
        """The record of the choice in the manifest, if one was made."""
        if self.chosen is None:
            return None
        return Selection(data=self.data, candidates=self.candidates, chosen=self.chosen)


def candidates(scales: Sequence[float] = SCALES) -> list[Tried]:
    """No LoRA, and the trained and the corrected one at every scale; 1 is among `scales`."""
    return [NONE, *(Tried(adapter, scale) for adapter in ("trained", "corrected") for scale in scales)]


def scaled(pairs: Mapping[str, LoraPair], scale: float) -> dict[str, LoraPair]:
    """The pairs whose update is `scale` times as large. They share their tensors: `s (γ B) A = (γ s) B A`."""
    return {module: replace(pair, scaling=scale * pair.scaling) for module, pair in pairs.items()}


def standard_error(losses: torch.Tensor, tokens: torch.Tensor) -> float:
    """Standard error of `Σ losses / Σ tokens`, as the module's docstring says it.

    Both are `(samples,)`, sums over a sample's tokens; `losses` may be differences. Computed in float64. Samples
    without tokens do not count; at least two others are needed.
    """
    losses, tokens = losses[tokens > 0].double(), tokens[tokens > 0].double()
    count, total = len(tokens), tokens.sum()
    residuals = losses - losses.sum() / total * tokens
    return float((count / (count - 1) * residuals.square().sum()).sqrt() / total)


def table(tried: Sequence[Tried], losses: Sequence[torch.Tensor], tokens: torch.Tensor) -> list[Candidate]:
    """The measured candidates. `losses` are sums per sample `(samples,)`, one tensor per candidate."""
    none, reference = losses[tried.index(NONE)], losses[tried.index(REFERENCE)]
    return [
        Candidate(
            adapter=each.adapter,
            scale=each.scale,
            loss=float(loss.double().sum() / tokens.sum()),
            standard_error=standard_error(loss, tokens),
            standard_error_to_none=standard_error(loss - none, tokens),
            standard_error_to_corrected=standard_error(loss - reference, tokens),
        )
        for each, loss in zip(tried, losses, strict=True)
    ]


def choose(measured: Sequence[Candidate]) -> int:
    """The place of the candidate that the rule in the module's docstring chooses; it may be `none`."""
    reference = [Tried(each.adapter, each.scale) for each in measured].index(REFERENCE)
    better = [
        place
        for place, each in enumerate(measured)
        if measured[reference].loss - each.loss > each.standard_error_to_corrected
    ]
    return min(better, key=lambda place: measured[place].loss, default=reference)
