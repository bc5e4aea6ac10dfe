"""Accumulates the Grams of linear layers while batches stream through a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emloc_tools.errors import InputError, NumericalError
from emloc_tools.files.calibration import GramEntry, GramSpool
from emloc_tools.linalg.gram import accumulate, smaller_side
from emloc_tools.models.base import oriented
from emloc_tools.records import Gram, Layer, Progress, Side, Step
from emloc_tools.streaming.observe import Observer, Reading
from emloc_tools.streaming.padding import Padding
from emloc_tools.streaming.stream import LockStep
from emloc_tools.streaming.units import Unit

Key = tuple[str, ...]


class GramSums:
    """Accumulates Grams while batches stream through a model, and moves those of a finished unit to disk.

    A Gram is keyed by the layers that read the same tensor in the same calls. Should layers read the same tensor in
    some batches and different ones in others, they appear under several keys, and a layer's Gram is the sum over its
    keys.
    """

    def __init__(
        self,
        stream: LockStep,
        layers: Sequence[Layer],
        padding: Padding,
        spool: GramSpool,
        progress: Progress,
    ) -> None:
        self.spool = spool
        self._stream, self._progress = stream, progress
        self._layers = {member.name: member for layer in layers for member in layer.members()}
        self._sides: dict[str, Side] = {}
        self._grams: dict[Key, Gram] = {}
        self._done: set[Unit] = set()
        self._groups: dict[Key, list[Key]] = {}  # of the layers of an entry, the keys that it is the sum of
        self._observer = Observer(
            stream.model,
            [layer.name for layer in layers if layer.experts is None],
            stacks=[layer for layer in layers if layer.experts is not None],
            current=lambda: stream.current,
            mask=padding.mask,
            wanted=self._wanted,
        )
        stream.on_leave = self._leave
        stream.on_unit_done = self._unit_done

    def finish(self) -> None:
        """Take what no unit's end delivered, and move all Grams to disk."""
        for batch in self._observer.batches():
            self._add_all(self._observer.take(batch))
        self._flush()
        self._observer.close()
        if not self.spool.entries:
            raise InputError("no sample reached any of the chosen layers")
        self._groups = self._grouped()

    def reached(self) -> set[str]:
        """Layers that saw data."""
        return {layer for key in self.spool.entries for layer in key}

    def entries(self) -> list[GramEntry]:
        """The Grams to write: one per set of layers whose data agree in every call."""
        return [
            GramEntry(
                layers,
                self.spool.entries[keys[0]].side,
                self.spool.entries[keys[0]].features,
                sum(self.spool.entries[key].tokens for key in keys),
            )
            for layers, keys in self._groups.items()
        ]

    def packed(self, entry: GramEntry) -> torch.Tensor:
        """The packed Gram of an entry: the sum over its keys."""
        first, *others = self._groups[entry.layers]
        total = self.spool.read(first)
        for key in others:
            total += self.spool.read(key)
        return total

    def _grouped(self) -> dict[Key, list[Key]]:
        keys_of: dict[str, list[Key]] = {}
        for key in self.spool.entries:
            for layer in key:
                keys_of.setdefault(layer, []).append(key)
        groups: dict[tuple[Key, ...], list[str]] = {}
        for layer, keys in keys_of.items():
            groups.setdefault(tuple(keys), []).append(layer)
        return {tuple(layers): list(keys) for keys, layers in groups.items()}

    def _wanted(self, name: str) -> frozenset[Side]:
        """A bias would have to be taken off rounded outputs again: then outputs are computed anew from the inputs."""
        side = self._sides.get(name)
        if side == "output" and not self._layers[name].has_bias:
            return frozenset({"output"})
        return frozenset({"input"}) if side else frozenset({"input", "output"})

    def _leave(self, batch: int, unit: Unit) -> None:
        self._add_all(self._observer.take(batch))

    def _add_all(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            self._decide(reading.layers)
            shared = tuple(name for name in reading.layers if self._sides[name] == "input")
            if shared and reading.inputs is not None:
                self._add(shared, "input", reading.inputs)
            for name in reading.layers:
                if self._sides[name] == "output":
                    self._add((name,), "output", self._outputs(name, reading))

    def _decide(self, names: Sequence[str]) -> None:
        undecided = [self._layers[name] for name in names if name not in self._sides]
        if undecided:
            shared = any(self._sides.get(name) == "input" for name in names)
            side: Side = "input" if shared else smaller_side(undecided)
            self._sides.update({layer.name: side for layer in undecided})

    def _outputs(self, name: str, reading: Reading) -> torch.Tensor:
        layer = self._layers[name]
        if not layer.has_bias:
            return reading.outputs[name]
        weight = self._stream.model.get_submodule(name).weight
        assert reading.inputs is not None  # wanted for every layer with bias
        assert isinstance(weight, torch.Tensor)
        return reading.inputs.float() @ oriented(layer, weight).float().T

    def _add(self, key: Key, side: Side, rows: torch.Tensor) -> None:
        gram = self._grams.get(key)
        if gram is None:
            features = rows.shape[1]
            gram = Gram(torch.zeros(features, features, dtype=torch.float32, device=rows.device), side, 0)
        accumulate(gram.matrix, rows)
        self._grams[key] = Gram(gram.matrix, side, gram.tokens + rows.shape[0])

    def _unit_done(self, unit: Unit) -> None:
        self._flush()
        self._done.add(unit)
        self._progress(Step("calibrate", len(self._done), len(self._stream.units), unit.name))

    def _flush(self) -> None:
        for key, gram in self._grams.items():
            if not torch.isfinite(gram.matrix.diagonal()).all():
                raise NumericalError(f"the data of layer {key[0]} hold NaN or infinity; try --dtype float32")
            if gram.tokens:
                self.spool.add(key, gram)
        self._grams.clear()
