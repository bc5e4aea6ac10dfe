"""Where a layer is in its model: in which row of blocks, how deep, and of which kind, all told by its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A layer's place: `model.layers.3.mlp.up_proj` is of kind `mlp.up_proj` at depth (3) of `model.layers.*`.

    Blocks in blocks (U-Nets) have a depth of several numbers. A layer outside of all blocks has no depth.
    """

    blocks: str
    depth: tuple[int, ...]
    kind: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of every layer.

    What counts depth are the numbers in which the names of layers differ that are alike but for their numbers: the 0
    in `ff.net.0.proj` is none. Where only one such layer exists, its first number counts.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    return {
        name: _place(name, counting)
        for members in alike.values()
        for counting in [_counting(members)]
        for name in members
    }


def _counting(members: list[str]) -> list[int]:
    """At which parts of their names, all alike but for numbers, depth is counted."""
    parts = [name.split(".") for name in members]
    numbers = [at for at, part in enumerate(parts[0]) if part.isdigit()]
    return [at for at in numbers if len({each[at] for each in parts}) > 1] or numbers[:1]


def _place(name: str, counting: list[int]) -> Place:
    parts = name.split(".")
    if not counting:
        return Place("", (), name)
    end = counting[-1] + 1
    blocks = ".".join("*" if at in counting else part for at, part in enumerate(parts[:end]))
    return Place(blocks, tuple(int(parts[at]) for at in counting), ".".join(parts[end:]) or blocks)


@dataclass(frozen=True)
class Grid:
    """The layers of one row of blocks as a table: `names[depth, kind]`, of those that exist."""

    blocks: str
    depths: list[tuple[int, ...]]
    kinds: list[str]
    names: dict[tuple[tuple[int, ...], str], str]


def grids(names: Iterable[str]) -> list[Grid]:
    """One table per row of blocks, and one for all layers outside; kinds in the order of their first layers."""
    found: dict[str, dict[tuple[tuple[int, ...], str], str]] = {}
    for name, place in places(list(names)).items():
        found.setdefault(place.blocks, {})[place.depth, place.kind] = name
    return [
        Grid(blocks, sorted({depth for depth, _ in cells}), list(dict.fromkeys(kind for _, kind in cells)), cells)
        for blocks, cells in found.items()
    ]


def depth_text(depth: tuple[int, ...]) -> str:
    """A depth as it stands in a table."""
    return ".".join(map(str, depth)) or "-"
