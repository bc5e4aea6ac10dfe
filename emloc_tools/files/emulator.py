"""The emulator format (`formats/emulator/SPEC.md`): a Hugging Face model folder with factored layers and a manifest."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from emloc_tools.errors import FormatError
from emloc_tools.files.json_files import read_json, whole_number
from emloc_tools.files.manifest import (
    EmulatorV1,
    EmulatorV2,
    EmulatorV3,
    EmulatorV4,
    EmulatorV5,
    FactoredLayer,
    FactoredStack,
    WeightingRecord,
    file_hash,
)
from emloc_tools.files.manifest_reader import read_manifest
from emloc_tools.files.opening import file_inside, path_inside
from emloc_tools.files.tensors import TensorFolder, content_hash
from emloc_tools.records import Library

MANIFEST = "emulator.json"
CONFIG = "config.json"
FACTORS = ("U", "S", "Vh")
STEMS: dict[Library, str] = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}  # of the weights' files
QUANT_METHOD = "emloc"  # by which diffusers knows that a model needs our loader
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MODELS = (EmulatorV1, EmulatorV2, EmulatorV3, EmulatorV4, EmulatorV5)
MODEL_AUTO_CLASS = re.compile(r"AutoModel\w*", re.ASCII)
CODE_NAME = re.compile(r"[A-Za-z_]\w{0,100}\.py", re.ASCII)
CONFIG_REFERENCE = re.compile(r"([A-Za-z_]\w{0,100})\.[A-Za-z_]\w{0,200}", re.ASCII)
CLASS_REFERENCE = re.compile(r"([A-Za-z_]\w{0,100})\.(Emloc\w{1,200})", re.ASCII)


class Emulator:
    """An emulator folder. Opening checks the manifest, the configuration and all shapes; reading checks values."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        # The manifest's hash identifies the whole emulator, for it holds the hash of every tensor.
        self.manifest, self.hash = read_manifest(self.path, MODELS, rules=("E1", "E2", "E3"))
        self._check_config()
        self._check_code()
        self._single = f"{STEMS[self.library]}.safetensors"
        if not (self._locate(self._single) or self._locate(f"{self._single}.index.json")):
            raise FormatError("E4", folder / self._single, "", "does not exist, nor does an index of shards")
        self.tensors = TensorFolder.of_model(self._locate, STEMS[self.library], rule="E4")
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
    def stacks(self) -> dict[str, FactoredStack]:
        """The factored experts by the name of the tensor that held them."""
        return self.manifest.experts if isinstance(self.manifest, (EmulatorV3, EmulatorV5)) else {}

    @property
    def code(self) -> dict[str, str]:
        """The Python files of a base with code of its own, and the hashes of the files. They are never run."""
        return self.manifest.code if isinstance(self.manifest, EmulatorV5) else {}

    @property
    def weighting(self) -> WeightingRecord | None:
        """How the loss gradient weighted the error; None if it did not."""
        return getattr(self.manifest, "weighting", None)

    @property
    def library(self) -> Library:
        """The library that loads the folder."""
        return self.manifest.library if isinstance(self.manifest, EmulatorV4) else "transformers"

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`U (out, k)`, `S (k,)`, `Vh (k, in)` in the stored dtype, of a stack with one more dimension in front.

        Raises `FormatError` if they are damaged.
        """
        U, S, Vh = (self.read(name) for name in factor_names(layer, stack=layer in self.stacks))
        if not all(torch.isfinite(factor).all() for factor in (U, S, Vh)):
            raise self._error("E6", f"{layer}", "its factors hold NaN or infinity")
        if (S <= 0).any() or (S[..., 1:] > S[..., :-1]).any():
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
        rule = "E7" if self.library == "transformers" else "E16"
        path = file_inside(self.folder, CONFIG, rule)
        config = read_json(path, rule)
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        ranks |= {name: stack.rank for name, stack in self.stacks.items()}
        own = {"format_version": self.manifest.format_version, "ranks": ranks}
        if self.library == "transformers":
            self._check_transformers_config(path, config, own)
        else:
            self._check_diffusers_config(path, config, {"quant_method": QUANT_METHOD, **own})
        self._check_auto_map(path, config.get("auto_map"))

    def _check_transformers_config(self, path: Path, config: dict[str, Any], own: dict[str, Any]) -> None:
        found = config.get("emloc")
        if found != own or not _whole(found):
            raise FormatError("E7", path, "emloc", f"must hold the format version and the ranks of {MANIFEST}, only")
        expected = [f"Emloc{self.manifest.base.architecture}"]
        if config.get("architectures") != expected:
            raise FormatError("E11", path, "architectures", f"must be {expected}, a name that only this folder defines")
        if "quantization_config" in config:
            message = "must be absent: it makes trainers treat the emulator as a quantised model"
            raise FormatError("E13", path, "quantization_config", message)

    def _check_diffusers_config(self, path: Path, config: dict[str, Any], own: dict[str, Any]) -> None:
        found = config.get("quantization_config")
        if found != own or not _whole(found):
            message = f"must hold quant_method {QUANT_METHOD!r}, the format version and the ranks of {MANIFEST}, only"
            raise FormatError("E16", path, "quantization_config", message)
        expected = self.manifest.base.architecture
        if config.get("_class_name") != expected:
            raise FormatError("E17", path, "_class_name", f"must be {expected!r}, the class of the base")

    def _check_auto_map(self, path: Path, auto_map: Any) -> None:
        if not isinstance(auto_map, dict) or not auto_map:
            raise FormatError("E12", path, "auto_map", "must map Auto classes to classes in this folder")
        for auto, reference in auto_map.items():
            if self.code and auto == "AutoConfig":
                match = CONFIG_REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
                if match is None or f"{match[1]}.py" not in self.code:
                    raise FormatError("E12", path, f"auto_map.{auto}", "must be `module.Class` of a file in `code`")
                continue
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

    def _check_code(self) -> None:
        for name, digest in self.code.items():
            if CODE_NAME.fullmatch(name) is None:
                raise self._error("E20", f"code.{name}", "is not the plain name of a Python file")
            path = path_inside(self.folder, name, "E20")
            if path is None or file_hash(path) != digest:
                raise self._error("E20", f"code.{name}", "is not in the folder as it was written; the code was changed")

    def _check_files(self) -> None:
        if self._locate(f"{self._single}.index.json") and self._locate(self._single):
            message = "is there beside an index of shards; readers differ in which of them they take"
            raise FormatError("E4", self.folder / self._single, "", message)
        self.tensors.check_placement()

    def _check_factors(self) -> None:
        both = self.layers.keys() & self.stacks.keys()
        if both:
            raise self._error("E19", f"experts.{min(both)}", "is a layer, too")
        for name, layer in self.layers.items():
            self._check_rank(f"layers.{name}.rank", layer, max(layer.energetic, layer.floored))
            self._check_shapes(
                name, factor_names(name), factor_shapes(layer.out_features, layer.in_features, layer.rank)
            )
            bias = f"{name}.bias"
            if bias in self.tensors and self.tensors.spec(bias).shape != (layer.out_features,):
                raise self._error("E5", bias, f"must have shape [{layer.out_features}]")
        for name, stack in self.stacks.items():
            used = max(max(expert.energetic, expert.floored) for expert in stack.experts)
            self._check_rank(f"experts.{name}.rank", stack, used)
            shapes = factor_shapes(stack.out_features, stack.in_features, stack.rank, experts=len(stack.experts))
            self._check_shapes(name, factor_names(name, stack=True), shapes)

    def _check_rank(self, field: str, record: FactoredLayer | FactoredStack, used: int) -> None:
        if not used <= record.rank <= min(record.out_features, record.in_features):
            message = "must be at most the layer's smaller side, and at least `energetic` and `floored`"
            raise self._error("E5", field, message)

    def _check_shapes(self, layer: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        dtypes = set()
        for tensor, shape in zip(names, shapes, strict=True):
            if tensor not in self.tensors or self.tensors.spec(tensor).shape != shape:
                raise self._error("E5", tensor, f"must be stored with shape {list(shape)}")
            dtypes.add(self.tensors.spec(tensor).dtype)
        if len(dtypes) != 1 or not dtypes <= set(FLOATS):
            raise self._error("E5", layer, "its factors must share one dtype of float32, bfloat16, float16")

    def _check_weighting(self) -> None:
        if self.weighting is not None and self.manifest.calibration is None:
            raise self._error("E18", "calibration", "must not be null where the error was weighted")
        experts = {f"{name}.{number}" for name, stack in self.stacks.items() for number in range(len(stack.experts))}
        dense = set(self.weighting.sensitivity if self.weighting else ()) - set(self.layers) - experts
        if dense:
            raise self._error("E15", f"weighting.sensitivity.{min(dense)}", "is no factored layer")

    def _check_guard(self) -> None:
        replaced = [f"{name}.weight" for name in self.layers] + list(self.stacks)
        weights = [name for name in replaced if name in self.tensors]
        if len(weights) != 1 or self.tensors.spec(weights[0]).shape != (1,):
            message = "exactly one factored weight must be stored, with shape [1], to make other loaders fail"
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


def factor_names(layer: str, *, stack: bool = False) -> list[str]:
    """The tensors of U, S and Vh. Those of a stack of experts are parameters of the experts' module."""
    return [f"{layer}{'_' if stack else '.'}{factor}" for factor in FACTORS]


def factor_shapes(
    out_features: int, in_features: int, rank: int, *, experts: int | None = None
) -> list[tuple[int, ...]]:
    """The shapes of U, S and Vh of a layer, or of a stack of so many experts."""
    first = () if experts is None else (experts,)
    return [(*first, out_features, rank), (*first, rank), (*first, rank, in_features)]


def _whole(own: dict[str, Any]) -> bool:
    """Python takes `true` and `1.0` for 1; other readers of the file would not."""
    return whole_number(own["format_version"]) and all(map(whole_number, own["ranks"].values()))
