"""Values that travel together between the rooms of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Side = Literal["input", "output"]
Orientation = Literal["linear", "conv1d"]
Allocation = Literal["uniform", "adaptive"]
Weighting = Literal["none", "gradient"]
Library = Literal["transformers", "diffusers"]
Loss = Literal["next-token", "model", "squared-error"]  # what gradients are of; see formats/calibration/SPEC.md


@dataclass(frozen=True)
class Layer:
    """A linear layer of the base model: `y = W x + b` with `W (out_features, in_features)`.

    `orientation` says how the checkpoint holds W: `linear` as it is, `conv1d` transposed (GPT-2's Conv1D). `experts`
    is None but for a *stack*: one projection of that many experts, whose matrices are held in one tensor `(experts,
    out, in)` (or transposed) named `name`, and factored with one rank.
    """

    name: str
    out_features: int
    in_features: int
    orientation: Orientation
    has_bias: bool
    experts: int | None = None

    @property
    def parameters(self) -> int:
        """Number of entries of W, of all experts of a stack."""
        return (self.experts or 1) * self.out_features * self.in_features

    @property
    def rank_cost(self) -> int:
        """Number of stored values that one more rank costs: a column of U, an entry of S and a row of Vh per matrix."""
        return (self.experts or 1) * (self.out_features + self.in_features + 1)

    def members(self) -> list[Layer]:
        """The matrices as layers of their own: the layer itself, or those of a stack, called `<stack>.<number>`.

        An expert's matrix is a layer without bias: its outputs are always observed before the bias is added.
        """
        if self.experts is None:
            return [self]
        shape = (self.out_features, self.in_features, self.orientation)
        return [Layer(f"{self.name}.{number}", *shape, has_bias=False) for number in range(self.experts)]


@dataclass(frozen=True)
class Gram:
    """Second moments of a layer's calibration data, summed (not averaged) over `tokens` tokens.

    `matrix` is `XᵀX (in, in)` when `side` is `input`, or `YᵀY (out, out)` of the outputs without bias when
    `side` is `output`; symmetric, float32.
    """

    matrix: torch.Tensor
    side: Side
    tokens: int


@dataclass(frozen=True)
class GradientGram:
    """Second moments of the loss gradient g at a layer's output, summed (not averaged) over `tokens` tokens.

    `matrix` is `Σ g gᵀ (out, out)` when `side` is `output`, or that of the gradient at the layer's input,
    `Σ (Wᵀ g)(Wᵀ g)ᵀ (in, in)`, when `side` is `input`; symmetric, float32. `energy` is `Σ ‖g‖²` in either case.
    """

    matrix: torch.Tensor
    side: Side
    tokens: int
    energy: float


@dataclass(frozen=True)
class LowRank:
    """A layer's emulator `W_E = U diag(S) Vh`, and how it came about.

    `U (out, k)` has orthonormal columns unless the error was weighted by the loss gradient (then the energies are,
    too), `S (k,)` is positive and non-increasing, `Vh (k, in)`; float32.
    `energies (min(out, in),)` are the squared output magnitudes per direction, descending, float64: per token
    with calibration data, squared singular values of W without.
    `energetic` directions carry calibration energy; directions of U beyond them were filled in from the
    remaining part of W. The last `floored` entries of S were raised (and their rows of Vh lowered) so that S stays
    above `S[0] / 1000` and Vh below 4096, with W_E unchanged.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    energies: torch.Tensor
    energetic: int
    floored: int

    @property
    def rank(self) -> int:
        """Number of kept directions k."""
        return self.S.numel()

    @property
    def relative_error(self) -> float:
        """‖X Wᵀ − X W_Eᵀ‖ / ‖X Wᵀ‖ in the Frobenius norm, from the discarded tail; a fraction 0–1."""
        total = float(self.energies.sum())
        return (float(self.energies[self.rank :].sum()) / total) ** 0.5 if total > 0 else 0.0


@dataclass(frozen=True)
class Step:
    """Progress of a stage: `done` of `total` units of work, and what was just finished."""

    title: str
    done: int
    total: int
    detail: str = ""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """The default progress callback: shows nothing."""
