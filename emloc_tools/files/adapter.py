"""PEFT LoRA adapters (`formats/adapter/SPEC.md`): pairs, scalings, everything else untouched; and corrected ones.

Those in the file of diffusers are in `diffusers_lora`.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from emloc_tools.errors import FormatError, UnsupportedError
from emloc_tools.files.json_files import parse_object, read_json
from emloc_tools.files.manifest import AdapterManifest, AdapterV1, AdapterV2, AdapterV3, AdapterV4, Selection
from emloc_tools.files.manifest_reader import read_manifest
from emloc_tools.files.opening import file_inside, path_inside
from emloc_tools.files.patterns import ModulePattern
from emloc_tools.files.tensors import TensorFolder, content_hash

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "emloc.json"
PREFIX = "base_model.model."
MARK = "emloc"  # key in the safetensors header of a corrected adapter
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_NUMBER = 2**31  # no rank or alpha comes near; beyond it, integers would not convert to floats


@dataclass(frozen=True)
class LoraKeys:
    """Where the pair of one module is stored, and its scaling `s` and rank."""

    A: str
    B: str
    scaling: float
    rank: int


class Adapter:
    """A PEFT LoRA adapter folder. Opening checks the configuration, pairs and shapes; reading checks values.

    Of a corrected adapter, opening also reads all tensors and checks that nobody changed them. `prefix` stands before
    the names of modules in those of tensors; `component` is the part of a pipeline that an adapter of diffusers is for.
    """

    prefix = PREFIX
    component: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_path, self.weights_path = folder / CONFIG, folder / WEIGHTS
        self.config = read_json(file_inside(folder, CONFIG, "A1"), "A1")
        if self.config.get("peft_type") != "LORA":
            message = f"is {reprlib.repr(self.config.get('peft_type'))}; only LORA adapters can be used"
            raise FormatError("A2", self.config_path, "peft_type", message)
        self.tensors = TensorFolder.of_files([self._weights()], rule="A3")
        self._check()

    def _check(self) -> None:
        """Read everything but the tensors, once the configuration is read and the file open."""
        try:
            self._patterns = {key: self._read_patterns(key) for key in ("rank_pattern", "alpha_pattern")}
            self.loras = {module: self._keys(module) for module in self._modules()}
            self.manifest = self._read_corrected()
        except BaseException:
            self.tensors.close()
            raise

    @property
    def corrected(self) -> bool:
        """Whether `correct` wrote this adapter, so that it belongs to the base."""
        return self.manifest is not None

    @property
    def hash(self) -> str:
        """Identity of the adapter: a hash over the content hashes of its tensors."""
        digest = xxhash.xxh3_128()
        for name in self.tensors.names():
            digest.update(f"{name} {content_hash(self.tensors.read(name))}\n".encode())
        return f"xxh3_128:{digest.hexdigest()}"

    @property
    def other_tensors(self) -> list[str]:
        """Tensors that belong to no LoRA pair, such as those of `modules_to_save`."""
        paired = {key for lora in self.loras.values() for key in (lora.A, lora.B)}
        return [name for name in self.tensors.names() if name not in paired]

    @property
    def embeddings(self) -> dict[str, LoraKeys]:
        """The pairs of embeddings, which are among the other tensors: `A (r, rows)` and `B (features, r)`.

        The weight `(rows, features)` of an embedding gains `s (B A)ᵀ`. Raises `FormatError` as for the other pairs.
        """
        stem, end = "lora_embedding_{}", ".lora_embedding_A"
        names = [name for name in self.tensors.names() if name.startswith(self.prefix) and name.endswith(end)]
        return {m: self._keys(m, stem) for m in (n.removeprefix(self.prefix).removesuffix(end) for n in names)}

    def pair_shape(self, module: str) -> tuple[int, int]:
        """The shape of the weight that a module's pair is for: `(out, in)`, of an embedding `(rows, features)`."""
        keys = self.loras.get(module) or self.embeddings[module]
        A, B = self.tensors.spec(keys.A).shape, self.tensors.spec(keys.B).shape
        return (B[0], A[1]) if module in self.loras else (A[1], B[0])

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A (r, in)` and `B (out, r)` of a module in the stored dtype; NaN or infinity is a `FormatError`."""
        keys = self.loras[module]
        return self.read(keys.A), self.read(keys.B)

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its stored name; NaN or infinity is a `FormatError`."""
        tensor = self.tensors.read(name)
        # PyTorch has no isfinite for 8-bit floats, which may occur among other tensors.
        values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if tensor.is_floating_point() and not torch.isfinite(values).all():
            raise FormatError("A5", self.weights_path, name, "holds NaN or infinity; the training diverged")
        return tensor

    def close(self) -> None:
        """Release the file."""
        self.tensors.close()

    def _weights(self) -> Path:
        path = path_inside(self.folder, WEIGHTS, "A3")
        if path is None:
            pickled = (self.folder / "adapter_model.bin").exists()
            remedy = "; adapter_model.bin is pickled and is never opened, save it as safetensors" if pickled else ""
            raise FormatError("A3", self.weights_path, "", f"does not exist{remedy}")
        return path

    def _read_patterns(self, key: str) -> list[ModulePattern]:
        texts = self.config.get(key) or {}
        if not isinstance(texts, dict):
            raise FormatError("A6", self.config_path, key, "must map patterns to numbers")
        patterns = []
        for text in texts:
            try:
                patterns.append(ModulePattern(text))
            except ValueError as error:
                raise FormatError("A6", self.config_path, f"{key}.{text}", str(error)) from error
        return patterns

    def _modules(self) -> list[str]:
        if self.config.get("target_parameters"):
            raise UnsupportedError(
                f"{self.config_path}: target_parameters names parameters that are no linear layers, such as fused "
                "experts; give the trainer a list of linear target_modules instead of all-linear"
            )
        if self.config.get("use_bdlora"):
            raise UnsupportedError(
                f"{self.config_path}: use_bdlora stores the blocks of block-diagonal factors; train a plain LoRA"
            )
        modules = set()
        for name in self.tensors.names():
            match = re.fullmatch(re.escape(self.prefix) + r"(.+)\.lora_[AB]\.weight", name)
            if match:
                modules.add(match[1])
        if not modules:
            message = "holds no lora_A/lora_B pair of any linear layer"
            other = next((name for name in self.tensors.names() if re.search(r"(^|\.)lora_A\.", name)), None)
            if other is not None:
                message += f" under the names of PEFT, but {other}; emloc-tools verify --fix writes one that has these"
            raise FormatError("A4", self.weights_path, "", message)
        return sorted(modules)

    def _keys(self, module: str, stem: str = "lora_{}.weight") -> LoraKeys:
        A, B = (f"{self.prefix}{module}.{stem.format(side)}" for side in "AB")
        for key in (A, B):
            if key not in self.tensors:
                raise FormatError("A4", self.weights_path, key, "is missing although its partner is there")
        rank, alpha = self._value(module, "r", "rank_pattern"), self._value(module, "lora_alpha", "alpha_pattern")
        spec_A, spec_B = self.tensors.spec(A), self.tensors.spec(B)
        if len(spec_A.shape) != 2 or len(spec_B.shape) != 2 or not spec_A.shape[0] == spec_B.shape[1] == rank:
            source = self.config_path.name
            message = f"has shapes A {list(spec_A.shape)} and B {list(spec_B.shape)}; {source} says {rank=}"
            raise FormatError("A4", self.weights_path, module, message)
        if spec_A.dtype not in FLOATS or spec_B.dtype not in FLOATS:
            raise FormatError("A4", self.weights_path, module, "must be stored in float32, bfloat16 or float16")
        rslora = self.config.get("use_rslora")
        if not isinstance(rslora, (bool, type(None))):
            raise FormatError("A6", self.config_path, "use_rslora", "must be true or false")
        return LoraKeys(A, B, alpha / math.sqrt(rank) if rslora else alpha / rank, int(rank))

    def _value(self, module: str, key: str, pattern_key: str) -> float:
        """r or lora_alpha of a module: the first pattern that matches the end of its name, else the default."""
        value, field = self.config.get(key), key
        for pattern in self._patterns[pattern_key]:
            try:
                matches = pattern.matches(module)
            except ValueError as error:
                raise FormatError("A6", self.config_path, f"{pattern_key}.{pattern.text}", str(error)) from error
            if matches:
                value, field = self.config[pattern_key][pattern.text], f"{pattern_key}.{pattern.text}"
                break
        kinds = (int,) if key == "r" else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < LARGEST_NUMBER:
            return value
        kind = "whole number" if key == "r" else "number"
        message = f"must be a positive {kind} for {module}, found {reprlib.repr(value)}"
        raise FormatError("A6", self.config_path, field, message)

    def _read_corrected(self) -> AdapterManifest | None:
        path = self.folder / MANIFEST
        mark = self.tensors.metadata_of(self.weights_path.name).get(MARK)
        if path_inside(self.folder, MANIFEST, "A7") is None:
            if mark is not None:
                raise FormatError("A10", self.weights_path, MARK, f"marks a corrected adapter, but {MANIFEST} is gone")
            return None
        manifest: AdapterManifest
        manifest, _ = read_manifest(path, (AdapterV1, AdapterV2, AdapterV3, AdapterV4), rules=("A7", "A8", "A9"))
        component = manifest.component if isinstance(manifest, (AdapterV3, AdapterV4)) else None
        if component != self.component:
            message = f"is {component!r}; the weights are of {self.component or 'a PEFT adapter, which has none'}"
            raise FormatError("A20", path, "component", message)
        if mark is None:
            raise FormatError("A10", path, "", "describes a corrected adapter, but the weights carry no mark of it")
        if not _is_mark(mark, manifest.format_version):
            raise FormatError("A10", self.weights_path, MARK, f"must be {mark_of(manifest.format_version)}")
        for name in sorted(set(manifest.tensors) | set(self.tensors.names())):
            if name not in self.tensors or content_hash(self.tensors.read(name)) != manifest.tensors.get(name):
                raise FormatError("A11", path, f"tensors.{name}", "is not what was written; the weights were changed")
        self._check_layers(path, manifest)
        if isinstance(manifest, (AdapterV2, AdapterV4)) and manifest.selection is not None:
            _check_selection(path, manifest, manifest.selection)
        return manifest

    def _check_layers(self, path: Path, manifest: AdapterManifest) -> None:
        """The report must speak of this adapter: every tensor is corrected or unchanged, with the stated scaling."""
        for module in manifest.layers:
            if module not in self.loras:
                raise FormatError("A12", path, f"layers.{module}", "has no LoRA pair")
        corrected = [key for module in manifest.layers for key in (self.loras[module].A, self.loras[module].B)]
        accounted = [*corrected, *manifest.unchanged]
        if sorted(accounted) != self.tensors.names():
            differing = set(accounted) ^ set(self.tensors.names()) or set(corrected) | set(manifest.unchanged)
            message = "every tensor must be of one of `layers` or in `unchanged`, and not in both"
            raise FormatError("A12", path, f"unchanged.{min(differing)}", message)
        for module, record in manifest.layers.items():
            keys = self.loras[module]
            if record.rank != keys.rank or not math.isclose(record.scaling, keys.scaling, rel_tol=1e-12):
                source = self.config_path.name
                message = f"says rank {record.rank}, scaling {record.scaling}; {source} {keys.rank}, {keys.scaling}"
                raise FormatError("A13", path, f"layers.{module}", message)


def _check_selection(path: Path, manifest: AdapterManifest, selection: Selection) -> None:
    """The table must hold what its standard errors refer to, and name a candidate that fits what is stored."""
    candidates, chosen = selection.candidates, selection.chosen
    keys = [(candidate.adapter, candidate.scale) for candidate in candidates]
    place = "selection.candidates"
    for number, (adapter, scale) in enumerate(keys):
        if (adapter == "none") != (scale == 0):
            raise FormatError("A14", path, f"{place}.{number}.scale", f"is {scale:g} with the adapter {adapter!r}")
        if keys.index((adapter, scale)) != number:
            raise FormatError("A14", path, f"{place}.{number}", f"says {adapter} at scale {scale:g} once more")
    for adapter, scale in (("none", 0.0), ("corrected", 1.0)):
        if (adapter, scale) not in keys:
            raise FormatError("A14", path, place, f"lacks the adapter {adapter!r} at scale {scale:g}")
    if chosen >= len(keys) or keys[chosen][0] == "none":
        raise FormatError("A15", path, "selection.chosen", f"is {chosen}, which is no candidate with a LoRA")
    if keys[chosen][0] == "trained" and manifest.layers:
        message = "is corrected, but the chosen candidate is the LoRA as it was trained"
        raise FormatError("A16", path, f"layers.{min(manifest.layers)}", message)


def mark_of(version: int) -> str:
    """The mark of a corrected adapter in the header of its weights."""
    return json.dumps({"corrected": True, "format_version": version}, sort_keys=True)


def _is_mark(text: str, version: int) -> bool:
    try:
        found = parse_object(text.encode())
    except ValueError:
        return False
    wanted = {"corrected": True, "format_version": version}
    return found == wanted and all(type(found[key]) is type(wanted[key]) for key in wanted)
