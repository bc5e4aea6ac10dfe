"""correct: turn a LoRA that was trained on an emulator into one for the base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc_tools.errors import InputError, MismatchError, NumericalError, UnsupportedError
from emloc_tools.files.adapter import CONFIG as ADAPTER
from emloc_tools.files.adapter import PREFIX, Adapter, write_adapter
from emloc_tools.files.emulator import FACTORS, Emulator
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import BaseRecord, CorrectedLayer, made_by
from emloc_tools.files.tensors import content_hash
from emloc_tools.linalg.correction import CLAMP, Correction, correct_lora
from emloc_tools.models.base import BaseModel, choose_device, open_base, oriented
from emloc_tools.models.lora import match_module
from emloc_tools.records import Layer, Progress, Step, silent
from emloc_tools.stages.refusals import require_apart, require_artifact, require_original, require_plain_lora


@dataclass(frozen=True)
class CorrectionResult:
    """What the correction did, per layer. `output` is None for a dry run."""

    output: Path | None
    layers: dict[str, CorrectedLayer]
    unchanged: list[str]


def correct(
    *,
    emulator: Path,
    adapter: Path,
    base: str,
    output: Path | None,
    revision: str | None = None,
    clamp: float | None = CLAMP,
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.correct",
    progress: Progress = silent,
) -> CorrectionResult:
    """Write to `output` the PEFT adapter for `base` from one trained on `emulator`; with `output=None` only report.

    Reads the weights that the adapter touches, one at a time. The input is not changed; rank, scaling and dtype stay.
    LoRA pairs on layers that the emulator kept dense, and tensors of `modules_to_save`, are passed on as they are.

    Raises `MismatchError` for a base or an adapter that does not belong to the emulator or is corrected already,
    `UnsupportedError` for kinds of adapters that cannot be corrected, `NumericalError` for NaN or infinity.
    """
    require_original(base)
    require_artifact(emulator, EMULATOR, "an emulator")
    require_artifact(adapter, ADAPTER, "a PEFT adapter")
    if output is not None:
        require_apart(output, [emulator, adapter, Path(base)])
        check_output(output, overwrite=overwrite)
    if clamp is not None and not 0 < clamp < math.inf:
        raise InputError(f"--clamp {clamp:g} must be a number above 0, such as {CLAMP:g}, or none for no limit")
    device = choose_device(device)
    with contextlib.ExitStack() as stack:
        trained = stack.enter_context(contextlib.closing(Adapter(adapter)))
        if trained.corrected:
            raise MismatchError(f"the adapter in {adapter} is corrected already; use it with its base as it is")
        bundle = stack.enter_context(contextlib.closing(Emulator(emulator)))
        require_plain_lora(trained)
        _refuse_saved_factors(trained, bundle)
        opened = open_base(base, revision=revision, trust_remote_code=trust_remote_code)
        stack.enter_context(opened.tensors)
        _same_architecture(opened.architecture, bundle, base)
        pairs = _Pairs(trained, bundle, opened, clamp, device)
        tensors: dict[str, torch.Tensor] = {}
        records: dict[str, CorrectedLayer] = {}
        for number, (module, keys) in enumerate(trained.loras.items(), 1):
            corrected = pairs.correct(module)
            if corrected is not None:
                for key, tensor in ((keys.A, corrected.A), (keys.B, corrected.B)):
                    tensors[key] = _stored(trained, module, key, tensor)
                records[module] = _record(trained, module, corrected)
            progress(Step("correct", number, len(trained.loras), module))
        unchanged = [key for key in trained.tensors.names() if key not in tensors]
        if output is not None:
            tensors |= {key: trained.read(key) for key in unchanged}
            folder = stack.enter_context(new_folder(output, overwrite=overwrite))
            write_adapter(
                folder,
                _config(trained.config, base, opened.source.revision, type(opened.model)),
                tensors,
                fields={
                    "made_by": made_by(command),
                    "base": BaseRecord(id=base, revision=opened.source.revision, architecture=opened.architecture),
                    "emulator": bundle.hash,
                    "trained_adapter": trained.hash,
                    "clamp": clamp,
                    "layers": records,
                    "unchanged": unchanged,
                },
            )
    return CorrectionResult(output, records, unchanged)


class _Pairs:
    """Corrects one LoRA pair at a time, after checking that its module has the weight the emulator was made from."""

    def __init__(self, trained: Adapter, bundle: Emulator, opened: BaseModel, clamp: float | None, device: str) -> None:
        self._trained, self._bundle, self._base_id = trained, bundle, opened.source.id
        self._clamp, self._device = clamp, device
        modules = {name for name, module in opened.model.named_modules() if hasattr(module, "weight")}
        self._names = {module: self._find(module, modules) for module in trained.loras}
        self._weights = opened.weights([_layer(bundle, name) for name in self._names.values() if name in bundle.layers])

    def correct(self, module: str) -> Correction | None:
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
        if (A.shape[1], B.shape[0]) != (layer.in_features, layer.out_features):
            raise MismatchError(
                f"the LoRA pair of {module} is for {B.shape[0]} x {A.shape[1]}, the emulator's layer is "
                f"{layer.out_features} x {layer.in_features}; the adapter was trained on another model"
            )
        scaling, factors = self._trained.loras[module].scaling, self._bundle.factors(name)
        try:
            return correct_lora(A, B, scaling, oriented(layer, W), *factors, clamp=self._clamp)
        except NumericalError as error:
            raise NumericalError(f"layer {module}: {error}") from error

    def _find(self, module: str, modules: Collection[str]) -> str:
        name = match_module(module, self._bundle.layers) or match_module(module, modules)
        if name is None:
            raise MismatchError(
                f"the adapter in {self._trained.folder} adapts {module}, which {self._base_id} does not have; it was "
                "trained on another model"
            )
        return name

    def _require(self, same: bool, stored: str) -> None:
        if not same:
            raise MismatchError(
                f"{stored} of {self._base_id} is not the weight that the emulator in {self._bundle.folder} was made "
                f"from ({self._bundle.manifest.base.id}); pass that very model as --base"
            )


def _stored(trained: Adapter, module: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A corrected tensor in the dtype of the trained one."""
    stored = tensor.to(trained.tensors.spec(key).dtype).cpu()
    if not torch.isfinite(stored).all():
        raise NumericalError(f"layer {module}: the corrected pair exceeds {stored.dtype}; save the LoRA in float32")
    return stored


def _refuse_saved_factors(trained: Adapter, bundle: Emulator) -> None:
    """Whole modules that the adapter saves replace the base's, which is impossible for factors."""
    for key in trained.other_tensors:
        module, _, part = key.removeprefix(PREFIX).rpartition(".")
        if part in FACTORS or (part == "weight" and match_module(module, bundle.layers) is not None):
            raise UnsupportedError(
                f"{trained.folder} saves {module} as a whole (modules_to_save), but the emulator holds it as factors; "
                "leave it out of modules_to_save, or keep it dense with --exclude when building the emulator"
            )


def _same_architecture(architecture: str, bundle: Emulator, base: str) -> None:
    expected = bundle.manifest.base.architecture
    if architecture != expected:
        raise MismatchError(f"{base} is a {architecture}, the emulator was made from a {expected}; pass that base")


def _layer(bundle: Emulator, name: str) -> Layer:
    record = bundle.layers[name]
    return Layer(name, record.out_features, record.in_features, record.orientation, has_bias=False)


def _record(trained: Adapter, module: str, corrected: Correction) -> CorrectedLayer:
    keys = trained.loras[module]
    return CorrectedLayer(
        rank=keys.rank,
        scaling=keys.scaling,
        directions=corrected.directions,
        clamped=corrected.clamped,
        delta_norm=corrected.delta_norm,
        update_norm=corrected.update_norm,
    )


def _config(trained: Mapping[str, Any], base: str, revision: str | None, base_class: type) -> dict[str, Any]:
    """The trained adapter's configuration, pointing at the base; unknown fields pass through."""
    config = {**trained, "base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    if config.get("auto_mapping"):
        # Without a task type, PEFT finds the model class by this; it named the emulator's own code.
        config["auto_mapping"] = {
            "base_model_class": base_class.__name__,
            "parent_library": base_class.__module__,
        }
    config["init_lora_weights"] = True  # pairs are complete; other inits would try to rewrite the base on loading
    return config
