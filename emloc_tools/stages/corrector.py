"""Corrects LoRA pairs one at a time, each against the very weight that the emulator was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_tools.errors import MismatchError, NumericalError, UnsupportedError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.emulator import FACTORS, Emulator
from emloc_tools.files.exported import exported_emulator
from emloc_tools.files.manifest import CorrectedLayer
from emloc_tools.files.tensors import content_hash
from emloc_tools.linalg.correction import correct_lora
from emloc_tools.models.adapted import AdaptedModules, require_pair_shape
from emloc_tools.models.base import BaseModel, oriented
from emloc_tools.models.lora import match_module
from emloc_tools.records import Layer


@dataclass(frozen=True)
class CorrectedPair:
    """`A (r, in)` and `B (out, r)` in the dtype of the trained ones, on the CPU, and what was done to them."""

    A: torch.Tensor
    B: torch.Tensor
    record: CorrectedLayer


class Corrector:
    """Corrects one LoRA pair at a time, after checking that its module has the weight the emulator was made from."""

    def __init__(self, trained: Adapter, bundle: Emulator, opened: BaseModel, clamp: float | None, device: str) -> None:
        self._trained, self._bundle, self._base_id = trained, bundle, opened.source.id
        self._clamp, self._device = clamp, device
        modules = AdaptedModules(opened.model, trained.folder, opened.source.id)
        self._names = {module: match_module(module, bundle.layers) or modules.find(module) for module in trained.loras}
        self._weights = opened.weights([_layer(bundle, name) for name in self._names.values() if name in bundle.layers])

    def correct(self, module: str) -> CorrectedPair | None:
        """The corrected pair of an adapted module; None where the emulator has the base's own weight."""
        name = self._names[module]
        stored = self._weights.source_of[f"{name}.weight"]
        W = self._weights.load([stored])[stored]
        if name not in self._bundle.layers:
            self._require(content_hash(W) == self._bundle.manifest.tensors.get(stored), stored)
            return None
        self._require(self._weights.hashes[stored] == self._bundle.layers[name].weight_hash, stored)
        layer = _layer(self._bundle, name)
        A, B = (tensor.to(self._device) for tensor in self._trained.pair(module))
        shape = (layer.out_features, layer.in_features)
        require_pair_shape(module, (B.shape[0], A.shape[1]), shape, "the emulator's layer")
        keys, factors = self._trained.loras[module], self._bundle.factors(name)
        try:
            corrected = correct_lora(A, B, keys.scaling, oriented(layer, W), *factors, clamp=self._clamp)
        except NumericalError as error:
            raise NumericalError(f"layer {module}: {error}") from error
        record = CorrectedLayer(
            rank=keys.rank,
            scaling=keys.scaling,
            directions=corrected.directions,
            clamped=corrected.clamped,
            delta_norm=corrected.delta_norm,
            update_norm=corrected.update_norm,
        )
        return CorrectedPair(self._stored(keys.A, corrected.A), self._stored(keys.B, corrected.B), record)

    def scaled(self, tensors: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        """Every B of `tensors` (by their stored names) times `scale`, in its own dtype."""
        return {keys.B: self._stored(keys.B, scale * tensors[keys.B].float()) for keys in self._trained.loras.values()}

    def _stored(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the dtype of the trained one of that name."""
        stored = tensor.to(self._trained.tensors.spec(key).dtype).cpu()
        if not torch.isfinite(stored).all():
            raise NumericalError(f"{key}: the corrected pair exceeds {stored.dtype}; save the LoRA in float32")
        return stored

    def _require(self, same: bool, stored: str) -> None:
        if not same:
            raise MismatchError(
                f"{stored} of {self._base_id} is not the weight that the emulator in {self._bundle.folder} was made "
                f"from ({self._bundle.manifest.base.id}); pass that very model as --base"
            )


def require_trained_on(trained: Adapter, bundle: Emulator) -> None:
    """Refuse an adapter whose configuration leads to the dense export of another emulator.

    An export that was moved away leaves no sign.
    """
    named = trained.config.get("base_model_name_or_path")
    found = None
    with contextlib.suppress(OSError, ValueError):  # a text that is no path
        found = exported_emulator(Path(named)) if isinstance(named, str) else None
    if found is not None and found != bundle.hash:
        raise MismatchError(
            f"{trained.folder} was trained on {named}, a dense export of another emulator than that in "
            f"{bundle.folder}; pass the one that it was made from"
        )


def refuse_saved_factors(trained: Adapter, bundle: Emulator) -> None:
    """Whole modules that the adapter saves replace the base's, which is impossible for factors."""
    for key in trained.other_tensors:
        module, _, part = key.removeprefix(trained.prefix).rpartition(".")
        if part in FACTORS or (part == "weight" and match_module(module, bundle.layers) is not None):
            raise UnsupportedError(
                f"{trained.folder} saves {module} as a whole (modules_to_save), but the emulator holds it as factors; "
                "leave it out of modules_to_save, or keep it dense with --exclude when building the emulator"
            )


def require_same_architecture(architecture: str, bundle: Emulator, base: str) -> None:
    """Refuse a base of another model class than the emulator's."""
    expected = bundle.manifest.base.architecture
    if architecture != expected:
        raise MismatchError(f"{base} is a {architecture}, the emulator was made from a {expected}; pass that base")


def _layer(bundle: Emulator, name: str) -> Layer:
    record = bundle.layers[name]
    return Layer(name, record.out_features, record.in_features, record.orientation, has_bias=False)
