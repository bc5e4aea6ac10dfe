"""The calibration format (`formats/calibration/SPEC.md`): Gram matrices of linear layers, and where they come from."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from emloc_tools.errors import FormatError
from emloc_tools.files.folders import write_json
from emloc_tools.files.manifest import (
    CalibrationManifest,
    GramRecord,
    manifest_dict,
    read_manifest,
)
from emloc_tools.files.opening import path_inside
from emloc_tools.files.tensors import ShardedWriter, TensorFolder, TensorSpec, content_hash
from emloc_tools.records import Gram, Side

MANIFEST = "calibration.json"


class Calibration:
    """A calibration folder. Opening checks everything but the tensors' values, which `gram` checks as it reads."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        # The manifest's hash identifies the whole calibration, for it holds the hash of every tensor.
        self.manifest, self.hash = read_manifest(self.path, CalibrationManifest, rules=("C1", "C2", "C3"))
        self._check_layers()
        self.tensors = TensorFolder.of_files(self._shards(), rule="C4")
        self._record_of: dict[str, GramRecord] = {}
        try:
            self._check_grams()
        except BaseException:
            self.tensors.close()
            raise

    def record(self, layer: str) -> GramRecord:
        """Which Gram belongs to a layer."""
        return self._record_of[layer]

    def gram(self, layer: str) -> Gram:
        """The Gram of a layer, unpacked, float32. Raises `FormatError` if its values are damaged."""
        record = self._record_of[layer]
        packed = self.tensors.read(record.tensor)
        if content_hash(packed) != record.hash:
            raise self._error("C8", record.tensor, "has another content hash than the manifest; the file was changed")
        if not torch.isfinite(packed).all() or (packed_diagonal(packed, record.features) < 0).any():
            raise self._error("C9", record.tensor, "must be finite with a non-negative diagonal")
        return Gram(unpack_lower(packed, record.features), record.side, record.tokens)

    def close(self) -> None:
        """Release the files."""
        self.tensors.close()

    def _check_layers(self) -> None:
        wrong = _repeated(self.manifest.unreached) or set(self.manifest.unreached) & set(self.manifest.layers)
        if wrong:
            raise self._error("C10", f"unreached.{min(wrong)}", "is named twice, or in `layers` as well")

    def _shards(self) -> list[Path]:
        for name in _repeated(self.manifest.shards):
            raise self._error("C4", f"shards.{name}", "is named twice")
        paths = []
        for name in self.manifest.shards:
            path = path_inside(self.folder, name, "C4")
            if path is None:
                raise self._error("C4", f"shards.{name}", "does not exist")
            paths.append(path)
        return paths

    def _check_grams(self) -> None:
        names = [record.tensor for record in self.manifest.grams]
        wrong = _repeated(names) or set(names) ^ set(self.tensors.names())
        if wrong:
            raise self._error("C5", min(wrong), "must be stored, and belong to exactly one entry of grams")
        for record in self.manifest.grams:
            expected = TensorSpec(record.tensor, torch.float32, (record.features * (record.features + 1) // 2,))
            if self.tensors.spec(record.tensor) != expected:
                raise self._error("C5", record.tensor, f"must be a float32 tensor of shape {list(expected.shape)}")
            for layer in record.layers:
                self._check_layer(layer, record)
        for layer in self.manifest.layers:
            if layer not in self._record_of:
                raise self._error("C6", f"layers.{layer}", "belongs to no Gram")

    def _check_layer(self, layer: str, record: GramRecord) -> None:
        if layer in self._record_of or layer not in self.manifest.layers:
            raise self._error("C6", record.tensor, f"lists {layer}, which another Gram lists or `layers` does not")
        shape = self.manifest.layers[layer]
        expected = shape.in_features if record.side == "input" else shape.out_features
        if record.features != expected:
            message = f"has {record.features} features; the {record.side} of {layer} has {expected}"
            raise self._error("C7", record.tensor, message)
        self._record_of[layer] = record

    def _error(self, rule: str, field: str, message: str) -> FormatError:
        return FormatError(rule, self.path, field, message)


@dataclass(frozen=True)
class GramEntry:
    """A Gram about to be written: its layers, side, number of features and tokens."""

    layers: tuple[str, ...]
    side: Side
    features: int
    tokens: int


class GramSpool:
    """Grams that are not needed in memory: kept as packed float32 files in a scratch folder, summed on disk.

    A shared block is visited several times, so Grams of the same layers arrive in parts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.entries: dict[tuple[str, ...], GramEntry] = {}
        self._paths: dict[tuple[str, ...], Path] = {}

    def add(self, layers: tuple[str, ...], gram: Gram) -> None:
        """Add a Gram to what the same layers already have."""
        packed, tokens = pack_lower(gram.matrix.cpu()), gram.tokens
        path = self._paths.setdefault(layers, self._folder / f"{len(self._paths)}.float32")
        if layers in self.entries:
            packed += self.read(layers)
            tokens += self.entries[layers].tokens
        self.entries[layers] = GramEntry(layers, gram.side, gram.matrix.shape[0], tokens)
        packed.numpy().tofile(path)

    def read(self, layers: tuple[str, ...]) -> torch.Tensor:
        """The packed Gram of the given layers."""
        return torch.from_numpy(np.fromfile(self._paths[layers], dtype=np.float32))

    def remove(self) -> None:
        """Delete the scratch folder."""
        shutil.rmtree(self._folder)


def write_calibration(
    folder: Path,
    entries: Iterable[GramEntry],
    read: Callable[[GramEntry], torch.Tensor],
    *,
    max_shard_size: int,
    fields: Mapping[str, object],
) -> CalibrationManifest:
    """Write a calibration folder. `read(entry)` gives the packed Gram; `fields` are the other manifest fields."""
    entries = sorted(entries, key=lambda entry: entry.layers)
    specs = {entry: TensorSpec(_tensor_name(entry), torch.float32, (_size(entry),)) for entry in entries}
    writer = ShardedWriter(
        folder, "calibration", list(specs.values()), max_shard_size=max_shard_size, always_number=True
    )
    try:
        for entry, spec in specs.items():
            writer.write(spec.name, read(entry))
        shards = writer.finish()
    finally:
        writer.close()
    grams = [
        GramRecord(
            tensor=spec.name,
            side=entry.side,
            features=entry.features,
            tokens=entry.tokens,
            layers=list(entry.layers),
            hash=writer.hashes[spec.name],
        )
        for entry, spec in specs.items()
    ]
    manifest = CalibrationManifest.model_validate({**fields, "grams": grams, "shards": shards})
    write_json(folder / MANIFEST, manifest_dict(manifest))
    return manifest


def pack_lower(G: torch.Tensor) -> torch.Tensor:
    """The lower triangle of the symmetric `G (n, n)`, row by row: `(n(n+1)/2,)`, entry (i, j) at i(i+1)/2 + j."""
    n = G.shape[0]
    packed = torch.empty(n * (n + 1) // 2, dtype=G.dtype)
    for i in range(n):
        packed[i * (i + 1) // 2 :][: i + 1] = G[i, : i + 1]
    return packed


def unpack_lower(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The symmetric `(n, n)` matrix of a packed lower triangle; the inverse of `pack_lower`."""
    G = torch.empty(n, n, dtype=packed.dtype)
    for i in range(n):
        row = packed[i * (i + 1) // 2 :][: i + 1]
        G[i, : i + 1] = row
        G[: i + 1, i] = row
    return G


def packed_diagonal(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The diagonal `(n,)` of a packed lower triangle."""
    i = torch.arange(n)
    return packed[i * (i + 1) // 2 + i]


def _repeated(names: Sequence[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def _tensor_name(entry: GramEntry) -> str:
    return f"{entry.layers[0]}.{entry.side}_gram"


def _size(entry: GramEntry) -> int:
    return entry.features * (entry.features + 1) // 2
