"""The calibration format (`formats/calibration/SPEC.md`): Gram matrices of linear layers, and where they come from."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from emloc_tools.errors import FormatError
from emloc_tools.files.folders import write_json
from emloc_tools.files.manifest import (
    CalibratedLayer,
    CalibratedStack,
    CalibrationManifest,
    CalibrationV1,
    CalibrationV2,
    CalibrationV3,
    CalibrationV4,
    GradientRecord,
    GramRecord,
    StoredGram,
    manifest_dict,
)
from emloc_tools.files.manifest_reader import read_manifest
from emloc_tools.files.opening import path_inside
from emloc_tools.files.packing import pack_lower, packed_diagonal, packed_size, unpack_lower
from emloc_tools.files.ready_inputs import TARGET
from emloc_tools.files.tensors import ShardedWriter, TensorFolder, TensorSpec, content_hash
from emloc_tools.records import GradientGram, Gram, Layer, Loss, Side

MANIFEST = "calibration.json"
VERSIONS: tuple[type[CalibrationManifest], ...] = (CalibrationV1, CalibrationV2, CalibrationV3, CalibrationV4)

Kind = Literal["data", "gradient"]


class Calibration:
    """A calibration folder. Opening checks everything but the tensors' values, which are checked as they are read.

    `shapes` maps whatever may have statistics to its record: layers by name, experts as `<stack>.<number>`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        # The manifest's hash identifies the whole calibration, for it holds the hash of every tensor.
        self.manifest, self.hash = read_manifest(self.path, VERSIONS, rules=("C1", "C2", "C3"))
        self.shapes = self._shapes()
        self._check_layers()
        self.tensors = TensorFolder.of_files(self._shards(), rule="C4")
        self._record_of: dict[str, GramRecord] = {}
        self._gradient_of: dict[str, GradientRecord] = {}
        try:
            self._check_grams()
        except BaseException:
            self.tensors.close()
            raise

    @property
    def loss(self) -> Loss | None:
        """What the gradients are of, as the specification defines it. None without any."""
        with_loss = (CalibrationV2, CalibrationV3, CalibrationV4)
        return self.manifest.loss if isinstance(self.manifest, with_loss) else None

    @property
    def stacks(self) -> dict[str, CalibratedStack]:
        """The stacks of experts that have statistics of at least one expert."""
        return self.manifest.experts if isinstance(self.manifest, (CalibrationV3, CalibrationV4)) else {}

    @property
    def reached(self) -> list[str]:
        """What has statistics: the names of layers, and of experts as `<stack>.<number>`."""
        return [name for name in self.shapes if name in self._record_of]

    @property
    def gradient_layers(self) -> frozenset[str]:
        """The layers that have a gradient."""
        return frozenset(self._gradient_of)

    def has(self, name: str) -> bool:
        """Whether there are statistics under the name of a layer or an expert."""
        return name in self._record_of

    def has_data(self, layer: Layer) -> bool:
        """Whether there are statistics of a layer, or of any expert of a stack."""
        return any(member.name in self._record_of for member in layer.members())

    def has_gradients(self, layer: Layer) -> bool:
        """Whether there are gradients of a layer, or of any expert of a stack."""
        return any(member.name in self._gradient_of for member in layer.members())

    def weight_hash(self, layer: Layer) -> str:
        """The content hash of the weight that a layer or stack had in calibration."""
        return (self.manifest.layers if layer.experts is None else self.stacks)[layer.name].weight_hash

    def record(self, layer: str) -> GramRecord:
        """Which Gram of its data belongs to a layer."""
        return self._record_of[layer]

    def gram(self, layer: str) -> Gram:
        """The Gram of a layer's data, unpacked, float32. Raises `FormatError` if its values are damaged."""
        record = self._record_of[layer]
        return Gram(self._matrix(record), record.side, record.tokens)

    def gradient(self, layer: str) -> GradientGram | None:
        """The Gram of the loss gradient at a layer, unpacked, float32; None if the calibration has none for it.

        Raises `FormatError` if its values are damaged.
        """
        record = self._gradient_of.get(layer)
        if record is None:
            return None
        return GradientGram(self._matrix(record), _side(record), record.tokens, record.energy)

    def close(self) -> None:
        """Release the files."""
        self.tensors.close()

    def _matrix(self, record: StoredGram) -> torch.Tensor:
        packed = self.tensors.read(record.tensor)
        if content_hash(packed) != record.hash:
            raise self._error("C8", record.tensor, "has another content hash than the manifest; the file was changed")
        if not torch.isfinite(packed).all() or (packed_diagonal(packed, record.features) < 0).any():
            raise self._error("C9", record.tensor, "must be finite with a non-negative diagonal")
        return unpack_lower(packed, record.features)

    def _shapes(self) -> dict[str, CalibratedLayer]:
        shapes = dict(self.manifest.layers)
        for stack, record in self.stacks.items():
            for number in range(record.experts):
                name = f"{stack}.{number}"
                if shapes.setdefault(name, record) is not record:
                    raise self._error("C12", f"layers.{name}", f"is one of the experts of {stack}, too")
        return shapes

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
            expected = TensorSpec(record.tensor, torch.float32, (packed_size(record.features),))
            if self.tensors.spec(record.tensor) != expected:
                raise self._error("C5", record.tensor, f"must be a float32 tensor of shape {list(expected.shape)}")
            self._take(record)
        for layer in self.manifest.layers:
            if layer not in self._record_of:
                raise self._error("C6", f"layers.{layer}", "belongs to no Gram of data")
        unreached = set(self.manifest.unreached)
        for stack, shape in self.stacks.items():
            names = [f"{stack}.{number}" for number in range(shape.experts)]
            for name in names:
                if (name in self._record_of) == (name in unreached):
                    raise self._error("C12", f"experts.{name}", "must have a Gram of data, or else be unreached")
            if unreached.issuperset(names):
                raise self._error("C12", f"experts.{stack}", "has no expert with data, and must be left out")
        if (self.loss is not None) != bool(self._gradient_of):
            raise self._error("C11", "grams", "must hold a gradient if there is a `loss`, and none without")

    def _take(self, record: StoredGram) -> None:
        """Enter a record for its layers."""
        for layer in record.layers:
            taken = self._gradient_of if isinstance(record, GradientRecord) else self._record_of
            if layer in taken or layer not in self.shapes:
                message = f"lists {layer}, which another Gram of its kind lists or `layers` does not"
                raise self._error("C6", record.tensor, message)
            shape = self.shapes[layer]
            side = _side(record)
            expected = shape.in_features if side == "input" else shape.out_features
            if record.features != expected:
                message = f"has {record.features} features; the {side} of {layer} has {expected}"
                raise self._error("C7", record.tensor, message)
            if isinstance(record, GradientRecord):
                self._gradient_of[layer] = record
            elif isinstance(record, GramRecord):
                self._record_of[layer] = record

    def _error(self, rule: str, field: str, message: str) -> FormatError:
        return FormatError(rule, self.path, field, message)


@dataclass(frozen=True)
class GramEntry:
    """A Gram about to be written: its layers, side, number of features and tokens.

    One of the kind `gradient` belongs to a single layer and has the `energy` Σ‖g‖²; one of `data` has none.
    """

    layers: tuple[str, ...]
    side: Side
    features: int
    tokens: int
    kind: Kind = "data"
    energy: float | None = None

    def __post_init__(self) -> None:
        gradient = self.kind == "gradient"
        if gradient != (self.energy is not None) or (gradient and len(self.layers) != 1):
            raise ValueError(f"{self}: a gradient, and nothing else, has one layer and an energy")


class GramSpool:
    """Grams that are not needed in memory: kept as packed float32 files in a scratch folder, summed on disk.

    A shared block is visited several times, so Grams of the same layers arrive in parts. `entries` are those of the
    data, `gradients` those of the loss gradient, both by their layers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.entries: dict[tuple[str, ...], GramEntry] = {}
        self.gradients: dict[tuple[str, ...], GramEntry] = {}
        self._paths: dict[tuple[Kind, tuple[str, ...]], Path] = {}

    def add(self, layers: tuple[str, ...], gram: Gram | GradientGram) -> None:
        """Add a Gram to what the same layers already have of its kind."""
        packed, features = pack_lower(gram.matrix.cpu()), gram.matrix.shape[0]
        if isinstance(gram, GradientGram):
            entry = GramEntry(layers, gram.side, features, gram.tokens, "gradient", gram.energy)
        else:
            entry = GramEntry(layers, gram.side, features, gram.tokens)
        kept = self.gradients if entry.kind == "gradient" else self.entries
        path = self._paths.setdefault((entry.kind, layers), self._folder / f"{len(self._paths)}.float32")
        if layers in kept:
            packed += self.read(layers, entry.kind)
            entry = _sum(kept[layers], entry)
        kept[layers] = entry
        packed.numpy().tofile(path)

    def read(self, layers: tuple[str, ...], kind: Kind = "data") -> torch.Tensor:
        """The packed Gram of the given layers."""
        return torch.from_numpy(np.fromfile(self._paths[kind, layers], dtype=np.float32))

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
    """Write a calibration folder. `read(entry)` gives the packed Gram; `fields` are the other manifest fields.

    The version is 4 for gradients of the squared error, 3 if the fields name `experts`, else 2 if an entry is a
    gradient; then `loss` must be among the fields. Without any gradient there is nothing to say about a loss: `loss`,
    if given, is left out.
    """
    entries = sorted(entries, key=lambda entry: (entry.layers, entry.kind))
    specs = {entry: TensorSpec(_tensor_name(entry), torch.float32, (packed_size(entry.features),)) for entry in entries}
    writer = ShardedWriter(
        folder, "calibration", list(specs.values()), max_shard_size=max_shard_size, always_number=True
    )
    try:
        for entry, spec in specs.items():
            writer.write(spec.name, read(entry))
        shards = writer.finish()
    finally:
        writer.close()
    grams = [_stored(entry, spec.name, writer.hashes[spec.name]) for entry, spec in specs.items()]
    fields = {**fields, "grams": grams, "shards": shards}
    has_gradients = any(entry.kind == "gradient" for entry in entries)
    if has_gradients and fields.get("loss") == "squared-error":
        version = 4
        fields |= {"experts": fields.get("experts", {}), "target": TARGET}
    elif fields.get("experts"):
        version = 3
        fields["loss"] = fields.get("loss") if has_gradients else None
    else:
        version = 2 if has_gradients else 1
        fields = {name: value for name, value in fields.items() if name != "experts"}
        if not has_gradients:
            fields.pop("loss", None)
    manifest = VERSIONS[version - 1].model_validate(fields)
    write_json(folder / MANIFEST, manifest_dict(manifest))
    return manifest


def _stored(entry: GramEntry, tensor: str, digest: str) -> dict[str, object]:
    """An entry as it stands in the manifest."""
    return {
        "tensor": tensor,
        "side": _stored_side(entry),
        "features": entry.features,
        "tokens": entry.tokens,
        "layers": list(entry.layers),
        "hash": digest,
        **({} if entry.energy is None else {"energy": entry.energy}),
    }


def _sum(first: GramEntry, second: GramEntry) -> GramEntry:
    energy = None if first.energy is None or second.energy is None else first.energy + second.energy
    return replace(first, tokens=first.tokens + second.tokens, energy=energy)


def _side(record: StoredGram) -> Side:
    return "input" if record.side in ("input", "input_gradient") else "output"


def _stored_side(entry: GramEntry) -> str:
    return f"{entry.side}_gradient" if entry.kind == "gradient" else entry.side


def _tensor_name(entry: GramEntry) -> str:
    return f"{entry.layers[0]}.{_stored_side(entry)}_gram"


def _repeated(names: Sequence[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
