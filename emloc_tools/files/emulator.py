"""The emulator format (`formats/emulator/SPEC.md`): a Hugging Face model folder with factored layers and a manifest."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from emloc_tools.errors import FormatError
from emloc_tools.files.json_files import read_json, whole_number
from emloc_tools.files.manifest import EmulatorV1, EmulatorV2, FactoredLayer, WeightingRecord
from emloc_tools.files.manifest_reader import read_manifest
from emloc_tools.files.opening import file_inside, path_inside
from emloc_tools.files.tensors import TensorFolder, content_hash

MANIFEST = "emulator.json"
CONFIG = "config.json"
FACTORS = ("U", "S", "Vh")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MODEL_AUTO_CLASS = re.compile(r"AutoModel\w*", re.ASCII)
CLASS_REFERENCE = re.compile(r"([A-Za-z_]\w{0,100})\.(Emloc\w{1,200})", re.ASCII)


class Emulator:
    """An emulator folder. Opening checks the manifest, the configuration and all shapes; reading checks values."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        # The manifest's hash identifies the whole emulator, for it holds the hash of every tensor.
        self.manifest, self.hash = read_manifest(self.path, (EmulatorV1, EmulatorV2), rules=("E1", "E2", "E3"))
        self._check_config()
        self.tensors = TensorFolder.of_model(self._locate, rule="E4")
        try:
            self._check_files()
            self._check_factors()
            self._check_weighting()
            self._check_guard()
            self._check_names()
        except BaseException:
            self.tensors.close()
            raise

    @property
    def layers(self) -> dict[str, FactoredLayer]:
        """The factored layers by module name."""
        return self.manifest.layers

    @property
    def weighting(self) -> WeightingRecord | None:
        """How the loss gradient weighted the error; None if it did not."""
        return self.manifest.weighting if isinstance(self.manifest, EmulatorV2) else None

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
        return path_inside(self.folder, name, "E4")

    def _check_config(self) -> None:
        path = file_inside(self.folder, CONFIG, "E7")
        config = read_json(path, "E7")
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        own = config.get("emloc")
        if own != {"format_version": self.manifest.format_version, "ranks": ranks} or not _whole(own):
            raise FormatError("E7", path, "emloc", f"must hold the format version and the ranks of {MANIFEST}, only")
        expected = [f"Emloc{self.manifest.base.architecture}"]
        if config.get("architectures") != expected:
            raise FormatError("E11", path, "architectures", f"must be {expected}, a name that only this folder defines")
        self._check_auto_map(path, config.get("auto_map"))
        if "quantization_config" in config:
            message = "must be absent: it makes trainers treat the emulator as a quantised model"
            raise FormatError("E13", path, "quantization_config", message)

    def _check_auto_map(self, path: Path, auto_map: Any) -> None:
        if not isinstance(auto_map, dict) or not auto_map:
            raise FormatError("E12", path, "auto_map", "must map Auto classes to classes in this folder")
        for auto, reference in auto_map.items():
            if MODEL_AUTO_CLASS.fullmatch(auto) is None:
                message = "is no Auto class of models; configurations and tokenizers need no code from an emulator"
                raise FormatError("E12", path, f"auto_map.{auto}", message)
            match = CLASS_REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
            if match is None:  # "owner/name--module.Class" would run code from somewhere else
                message = "must be `module.Class` of a file in this folder, with a class name that begins with Emloc"
                raise FormatError("E12", path, f"auto_map.{auto}", message)
            file = path_inside(self.folder, f"{match[1]}.py", "E12")
            if file is None or not file.is_file():
                raise FormatError("E12", path, f"auto_map.{auto}", f"names {match[1]}.py, which is not in the folder")

    def _check_files(self) -> None:
        if self._locate("model.safetensors.index.json") and self._locate("model.safetensors"):
            message = "is there beside an index of shards; readers differ in which of them they take"
            raise FormatError("E4", self.folder / "model.safetensors", "", message)
        self.tensors.check_placement()

    def _check_factors(self) -> None:
        for name, layer in self.layers.items():
            k = layer.rank
            if max(k, layer.energetic, layer.floored) > k or k > min(layer.out_features, layer.in_features):
                message = "must be at most the layer's smaller side, and at least `energetic` and `floored`"
                raise self._error("E5", f"layers.{name}.rank", message)
            shapes = {"U": (layer.out_features, k), "S": (k,), "Vh": (k, layer.in_features)}
            dtypes = set()
            for factor, shape in shapes.items():
                tensor = f"{name}.{factor}"
                if tensor not in self.tensors or self.tensors.spec(tensor).shape != shape:
                    raise self._error("E5", tensor, f"must be stored with shape {list(shape)}")
                dtypes.add(self.tensors.spec(tensor).dtype)
            if len(dtypes) != 1 or not dtypes <= set(FLOATS):
                raise self._error("E5", name, "its factors must share one dtype of float32, bfloat16, float16")
            bias = f"{name}.bias"
            if bias in self.tensors and self.tensors.spec(bias).shape != (layer.out_features,):
                raise self._error("E5", bias, f"must have shape [{layer.out_features}]")

    def _check_weighting(self) -> None:
        dense = set(self.weighting.sensitivity if self.weighting else ()) - set(self.layers)
        if dense:
            raise self._error("E15", f"weighting.sensitivity.{min(dense)}", "is no factored layer")

    def _check_guard(self) -> None:
        weights = [f"{name}.weight" for name in self.layers if f"{name}.weight" in self.tensors]
        if len(weights) != 1 or self.tensors.spec(weights[0]).shape != (1,):
            message = "exactly one factored layer must carry a `weight`, of shape [1], that makes other loaders fail"
            raise self._error("E8", weights[0] if weights else "layers", message)

    def _check_names(self) -> None:
        differing = set(self.tensors.weight_map) ^ set(self.manifest.tensors)
        if differing:
            raise self._error("E9", f"tensors.{min(differing)}", "is stored or listed, but not both")
        stored = sum(math.prod(self.tensors.spec(name).shape) for name in self.tensors.weight_map) - 1
        if self.manifest.parameters != stored:
            message = f"is {self.manifest.parameters}; the tensors without the guard hold {stored} values"
            raise self._error("E14", "parameters", message)

    def _error(self, rule: str, field: str, message: str) -> FormatError:
        return FormatError(rule, self.path, field, message)


def _whole(own: dict[str, Any]) -> bool:
    """Python takes `true` and `1.0` for 1; other readers of the file would not."""
    return whole_number(own["format_version"]) and all(map(whole_number, own["ranks"].values()))
