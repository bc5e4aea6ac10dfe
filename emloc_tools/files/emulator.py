"""The emulator format (`formats/emulator/SPEC.md`): a Hugging Face model folder with factored layers and a manifest."""

from __future__ import annotations

from pathlib import Path

import torch

from emloc_tools.errors import FormatError
from emloc_tools.files.manifest import EmulatorManifest, FactoredLayer, file_hash, read_manifest
from emloc_tools.files.tensors import TensorFolder, content_hash, read_json

MANIFEST = "emulator.json"
FACTORS = ("U", "S", "Vh")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Emulator:
    """An emulator folder. Opening checks the manifest, the configuration and all shapes; reading checks values."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        self.manifest = read_manifest(self.path, EmulatorManifest, rules=("E1", "E2", "E3"))
        self.tensors = TensorFolder.of_model(self._locate, rule="E4")
        self._check_factors()
        self._check_config()
        self._check_guard()
        self._check_names()

    @property
    def hash(self) -> str:
        """Identity of the emulator: the hash of its manifest, which holds the hash of every tensor."""
        return file_hash(self.path)

    @property
    def layers(self) -> dict[str, FactoredLayer]:
        """The factored layers by module name."""
        return self.manifest.layers

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`U (out, k)`, `S (k,)`, `Vh (k, in)` in the stored dtype. Raises `FormatError` if they are damaged."""
        U, S, Vh = (self.read(f"{layer}.{factor}") for factor in FACTORS)
        if not all(torch.isfinite(factor).all() for factor in (U, S, Vh)):
            raise self._error("E6", f"{layer}", "its factors hold NaN or infinity")
        if (S <= 0).any() or (S[1:] > S[:-1]).any():
            raise self._error("E6", f"{layer}.S", "must be positive and non-increasing")
        return U, S, Vh

    def read(self, name: str) -> torch.Tensor:
        """A tensor by name, checked against its content hash."""
        tensor = self.tensors.read(name)
        if content_hash(tensor) != self.manifest.tensors[name]:
            raise self._error("E10", name, "has another content hash than the manifest; the file was changed")
        return tensor

    def close(self) -> None:
        """Release the files."""
        self.tensors.close()

    def _locate(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None

    def _check_factors(self) -> None:
        for name, layer in self.layers.items():
            k = layer.rank
            if k > min(layer.out_features, layer.in_features):
                raise self._error("E5", f"layers.{name}.rank", "exceeds the layer's smaller side")
            shapes = {"U": (layer.out_features, k), "S": (k,), "Vh": (k, layer.in_features)}
            dtypes = set()
            for factor, shape in shapes.items():
                tensor = f"{name}.{factor}"
                if tensor not in self.tensors or self.tensors.spec(tensor).shape != shape:
                    raise self._error("E5", tensor, f"must be stored with shape {list(shape)}")
                dtypes.add(self.tensors.spec(tensor).dtype)
            if len(dtypes) != 1 or not dtypes <= set(FLOATS):
                raise self._error("E5", name, "its factors must share one dtype of float32, bfloat16, float16")

    def _check_config(self) -> None:
        path = self.folder / "config.json"
        config = read_json(path, "E7")
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        if config.get("emloc") != {"format_version": self.manifest.format_version, "ranks": ranks}:
            raise FormatError("E7", path, "emloc", "must hold the format version and the ranks of emulator.json")

    def _check_guard(self) -> None:
        weights = [f"{name}.weight" for name in self.layers if f"{name}.weight" in self.tensors]
        if len(weights) != 1 or self.tensors.spec(weights[0]).shape != (1,):
            message = "exactly one factored layer must carry a `weight`, of shape [1], that makes other loaders fail"
            raise self._error("E8", weights[0] if weights else "layers", message)

    def _check_names(self) -> None:
        differing = set(self.tensors.weight_map) ^ set(self.manifest.tensors)
        if differing:
            raise self._error("E9", f"tensors.{min(differing)}", "is stored or listed, but not both")

    def _error(self, rule: str, field: str, message: str) -> FormatError:
        return FormatError(rule, self.path, field, message)
