"""Reads a layer's weight and Gram, one at a time, and decomposes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from emloc_tools.errors import MismatchError, NumericalError
from emloc_tools.files.calibration import Calibration
from emloc_tools.linalg.lowrank import decompose, output_energies
from emloc_tools.linalg.weighting import decompose_weighted, loss_energies, sensitivity
from emloc_tools.models.base import oriented, weight_name
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import GradientGram, Gram, Layer, LowRank, Progress, Step


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
        """What the layer's directions are worth, descending, float64: to the loss, or as parts of its output energy."""
        with _naming(layer):
            W, gram, gradient = self._weight(layer), self._gram(layer), self._gradient(layer)
            if gram is not None and gradient is not None:
                energies = loss_energies(W, gram, gradient, damping=self._damping, dtype=self._dtype).cpu()
            else:
                energies = output_energies(W, gram, dtype=self._dtype).cpu()
                energies = energies / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)
        self._report("ranks", total, layer.name)
        return energies

    def decompose(self, layer: Layer, rank: int, total: int) -> LowRank:
        """The layer's factors, which are finite in the dtype that they will be stored in."""
        with _naming(layer):
            W, gram, gradient = self._weight(layer), self._gram(layer), self._gradient(layer)
            if gram is not None and gradient is not None:
                low_rank = decompose_weighted(W, rank, gram, gradient, damping=self._damping, dtype=self._dtype)
                self.sensitivity[layer.name] = sensitivity(gram, gradient, layer.out_features)
            else:
                low_rank = decompose(W, rank, gram, dtype=self._dtype)
            for factor in (low_rank.U, low_rank.S, low_rank.Vh):
                if not torch.isfinite(factor.to(self._stored)).all():
                    stored = str(self._stored).removeprefix("torch.")
                    raise NumericalError(f"its factors exceed the range of {stored}; use --dtype float32")
        self._report("factors", total, f"{layer.name}: rank {rank}, relative error {low_rank.relative_error:.3f}")
        return low_rank

    def _weight(self, layer: Layer) -> torch.Tensor:
        name = weight_name(layer)
        weight = self._weights.load([name])[name]
        if self._calibration is not None:
            expected = self._calibration.manifest.layers[layer.name].weight_hash
            if self._weights.hashes[name] != expected:
                raise MismatchError(
                    f"{name} is not the weight that was calibrated: the calibration in {self._calibration.folder} "
                    f"was made from {self._calibration.manifest.base.id}; use that base, or calibrate this one"
                )
        return oriented(layer, weight).to(self._device)

    def _gram(self, layer: Layer) -> Gram | None:
        return None if self._calibration is None else self._calibration.gram(layer.name)

    def _gradient(self, layer: Layer) -> GradientGram | None:
        return self._calibration.gradient(layer.name) if self._calibration is not None and self._weighted else None

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
