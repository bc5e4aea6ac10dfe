"""How the output energy of a factored layer spreads over its directions, as far as the emulator holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_tools.files.emulator import Emulator, factor_names
from emloc_tools.files.manifest import FactoredExpert, FactoredLayer

POINTS = 48  # of a curve; what lies between them is left out


@dataclass(frozen=True)
class Spectrum:
    """Shares of a layer's output energy, 0 to 1: of some of its directions, and of all beyond the cut.

    `share[i]` is that of direction number `direction[i]`, the strongest being number 1; `rank` directions are stored,
    of `full_rank`. Of those beyond the cut only their energy together, `beyond`, is known. The energy is that of the
    error's measure: weighted where the emulator is, of the weight where it has no calibration. The last `floored`
    stored magnitudes were raised, and are in no curve. Of a stack of experts it is the energy of all together that
    had tokens in calibration.
    """

    layer: str
    rank: int
    full_rank: int
    floored: int
    direction: list[int]
    share: list[float]
    beyond: float


def spectra(folder: Path) -> Iterator[Spectrum]:
    """The spectra of an emulator; only S of each layer is read. A layer without energy has none."""
    emulator = Emulator(folder)
    try:
        for name, layer in emulator.layers.items():
            yield from _spectrum(emulator, name, layer.rank, min(layer.out_features, layer.in_features), [layer])
        for name, stack in emulator.stacks.items():
            full_rank = min(stack.out_features, stack.in_features)
            yield from _spectrum(emulator, name, stack.rank, full_rank, stack.experts)
    finally:
        emulator.close()


def _spectrum(
    emulator: Emulator, name: str, rank: int, full_rank: int, matrices: Sequence[FactoredLayer | FactoredExpert]
) -> Iterator[Spectrum]:
    # Experts without tokens are SVDs of their weights, in other units than the outputs of the others.
    calibrated = emulator.manifest.calibration is not None
    idle = [calibrated and isinstance(each, FactoredExpert) and not each.tokens for each in matrices]
    kept = [at for at, unused in enumerate(idle) if not unused]
    total = sum(matrices[at].total_energy for at in kept)
    if not total > 0:
        return
    S = emulator.read(factor_names(name, stack=name in emulator.stacks)[1]).double().reshape(-1, rank)[kept]
    floored = max(matrices[at].floored for at in kept)
    energies = (S[:, : rank - floored] ** 2).sum(0) / total
    chosen = spread(energies.numel())
    yield Spectrum(
        layer=name,
        rank=rank,
        full_rank=full_rank,
        floored=floored,
        direction=[at + 1 for at in chosen],
        share=[float(energies[at]) for at in chosen],
        beyond=sum(matrices[at].relative_error ** 2 * matrices[at].total_energy for at in kept) / total,
    )


def spread(count: int) -> list[int]:
    """Up to `POINTS` of the numbers 0 … count − 1: all at the start, ever fewer later, the last one always."""
    if count <= POINTS:
        return list(range(count))
    steps = torch.logspace(0, torch.log10(torch.tensor(float(count))).item(), POINTS, dtype=torch.float64)
    return sorted({min(round(step), count) - 1 for step in steps.tolist()} | {count - 1})
