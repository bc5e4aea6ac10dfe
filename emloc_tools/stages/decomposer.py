"""Reads a layer's weight and Gram, one at a time, and decomposes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from emloc_tools.errors import MismatchError, NumericalError
from emloc_tools.files.calibration import Calibration
from emloc_tools.files.emulator import factor_shapes
from emloc_tools.files.manifest import FactoredExpert, FactoredStack
from emloc_tools.linalg.lowrank import decompose, output_energies
from emloc_tools.linalg.weighting import decompose_weighted, loss_energies, sensitivity
from emloc_tools.models.base import oriented, weight_name
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import GradientGram, Gram, Layer, LowRank, Progress, Step


@dataclass(frozen=True)
class StackFactors:
    """`U (E, out, k)`, `S (E, k)`, `Vh (E, k, in)` of E experts, and a record of each."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    experts: list[FactoredExpert]

    @classmethod
    def empty(cls, stack: Layer, rank: int, dtype: torch.dtype) -> StackFactors:
        """Room for all experts."""
        shapes = factor_shapes(stack.out_features, stack.in_features, rank, experts=stack.experts)
        U, S, Vh = (torch.empty(shape, dtype=dtype) for shape in shapes)
        return cls(U, S, Vh, [])

    def put(self, number: int, low_rank: LowRank, *, tokens: int) -> None:
        """Fill in the next expert."""
        for whole, factor in zip((self.U, self.S, self.Vh), (low_rank.U, low_rank.S, low_rank.Vh), strict=True):
            whole[number] = factor
        self.experts.append(
            FactoredExpert(
                tokens=tokens,
                relative_error=low_rank.relative_error,
                total_energy=float(low_rank.energies.sum()),
                energetic=low_rank.energetic,
                floored=low_rank.floored,
            )
        )

    def record(self, stack: Layer, weight_hash: str) -> FactoredStack:
        """What the manifest says of them."""
        return FactoredStack(
            out_features=stack.out_features,
            in_features=stack.in_features,
            orientation=stack.orientation,
            rank=self.S.shape[-1],
            weight_hash=weight_hash,
            experts=self.experts,
        )


class Decomposer:
    """Reads a layer's weight and Gram, checks that they belong together, and decomposes.

    Decompositions run in `dtype` on `device`; the factors are to be stored as `stored`. If `weighted`, the error of
    layers that have gradients is weighted by them with `damping`. `total` is the number of layers, for the progress.
    """

    def __init__(
        self,
        weights: ModelWeights,
        calibration: Calibration | None,
        device: str,
        dtype: torch.dtype,
        stored: torch.dtype,
        progress: Progress,
        *,
        weighted: bool,
        damping: float,
    ) -> None:
        self._weights, self._calibration, self._device = weights, calibration, device
        self._dtype, self._stored = dtype, stored
        self._weighted, self._damping = weighted, damping
        self._progress, self._done = progress, {"ranks": 0, "factors": 0}
        self.sensitivity: dict[str, float] = {}  # of the weighted layers that were decomposed

    def gains(self, layer: Layer, total: int) -> torch.Tensor:
        """What the layer's directions are worth, descending, float64: to the loss, or as parts of its output energy.

        A direction of a stack of experts is one of every expert, and worth their sum.
        """
        weighted = self._is_comparable(layer)
        energies = torch.zeros(min(layer.out_features, layer.in_features), dtype=torch.float64)
        for member, W in self._matrices(layer):
            energies += self._energies(member, W, weighted=weighted)
        if not weighted:
            energies = energies / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)
        self._report("ranks", total, layer.name)
        return energies

    def decompose(self, layer: Layer, rank: int, total: int) -> LowRank:
        """The layer's factors, which are finite in the dtype that they will be stored in."""
        (low_rank,) = self._low_ranks(layer, rank)
        self._report("factors", total, f"{layer.name}: rank {rank}, relative error {low_rank.relative_error:.3f}")
        return low_rank

    def decompose_stack(self, stack: Layer, rank: int, total: int) -> StackFactors:
        """The factors of all experts of a stack, in the dtype that they will be stored in.

        An expert that no token was routed to in calibration gets the truncated SVD of its weight.
        """
        found = StackFactors.empty(stack, rank, self._stored)
        for number, low_rank in enumerate(self._low_ranks(stack, rank)):
            found.put(number, low_rank, tokens=self._tokens(stack.members()[number]))
        self._report("factors", total, f"{stack.name}: {stack.experts} experts, rank {rank}")
        return found

    def _low_ranks(self, layer: Layer, rank: int) -> Iterator[LowRank]:
        """Of each matrix of a layer or stack."""
        for member, W in self._matrices(layer):
            with _naming(member):
                gram, gradient = self._gram(member), self._gradient(member)
                if gram is not None and gradient is not None:
                    low_rank = decompose_weighted(W, rank, gram, gradient, damping=self._damping, dtype=self._dtype)
                    self.sensitivity[member.name] = sensitivity(gram, gradient, member.out_features)
                else:
                    low_rank = decompose(W, rank, gram, dtype=self._dtype)
                for factor in (low_rank.U, low_rank.S, low_rank.Vh):
                    if not torch.isfinite(factor.to(self._stored)).all():
                        stored = str(self._stored).removeprefix("torch.")
                        raise NumericalError(f"its factors exceed the range of {stored}; use --dtype float32")
            yield low_rank

    def _energies(self, member: Layer, W: torch.Tensor, *, weighted: bool) -> torch.Tensor:
        """Of one matrix; zero of an expert without data, whose energies would be in another unit than the others'."""
        with _naming(member):
            gram, gradient = self._gram(member), self._gradient(member)
            if weighted and gram is not None and gradient is not None:
                return loss_energies(W, gram, gradient, damping=self._damping, dtype=self._dtype).cpu()
            if weighted or (gram is None and self._calibration is not None):
                return torch.zeros(min(W.shape), dtype=torch.float64)
            return output_energies(W, gram, dtype=self._dtype).cpu()

    def _is_comparable(self, layer: Layer) -> bool:
        """Whether the layer has gradients to weight it by."""
        return self._weighted and self._calibration is not None and self._calibration.has_gradients(layer)

    def _matrices(self, layer: Layer) -> Iterator[tuple[Layer, torch.Tensor]]:
        """The layer with its `W (out, in)`, or the members of a stack with theirs; the weight is read once."""
        name = weight_name(layer)
        weight = self._weights.load([name])[name]
        if self._calibration is not None:
            expected = self._calibration.weight_hash(layer)
            if self._weights.hashes[name] != expected:
                raise MismatchError(
                    f"{name} is not the weight that was calibrated: the calibration in {self._calibration.folder} "
                    f"was made from {self._calibration.manifest.base.id}; use that base, or calibrate this one"
                )
        W = oriented(layer, weight)
        for number, member in enumerate(layer.members()):
            yield member, (W if layer.experts is None else W[number]).to(self._device)

    def _gram(self, member: Layer) -> Gram | None:
        if self._calibration is None or not self._calibration.has_data(member):
            return None
        return self._calibration.gram(member.name)

    def _tokens(self, member: Layer) -> int:
        if self._calibration is None or not self._calibration.has_data(member):
            return 0
        return self._calibration.record(member.name).tokens

    def _gradient(self, member: Layer) -> GradientGram | None:
        return self._calibration.gradient(member.name) if self._calibration is not None and self._weighted else None

    def _report(self, title: str, total: int, detail: str) -> None:
        self._done[title] += 1
        self._progress(Step(title, self._done[title], total, detail))


@contextlib.contextmanager
def _naming(layer: Layer) -> Iterator[None]:
    """Put the layer's name before the message of a numerical error."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"layer {layer.name}: {error}") from error
