"""correct: turn a LoRA that was trained on an emulator into one for the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc_tools.errors import InputError, MismatchError, NumericalError, UnsupportedError
from emloc_tools.files.adapter import PREFIX, Adapter, write_adapter
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.folders import check_output, new_folder, require_folder
from emloc_tools.files.manifest import BaseRecord, CorrectedLayer, made_by
from emloc_tools.linalg.correction import CLAMP, Correction, correct_lora
from emloc_tools.models.base import open_base, oriented
from emloc_tools.models.lora import match_module
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import Layer, Progress, Step, silent


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
    if output is not None:
        check_output(output, overwrite=overwrite)
    if clamp is not None and not clamp > 0:
        raise InputError(f"--clamp {clamp:g} must be above 0")
    require_folder(emulator, "an emulator")
    require_folder(adapter, "a PEFT adapter")
    trained, bundle = Adapter(adapter), Emulator(emulator)
    if trained.corrected:
        raise MismatchError(f"the adapter in {adapter} is corrected already; use it with its base as it is")
    _refuse_unsupported(trained, bundle)
    modules = {module: match_module(module, bundle.layers) for module in trained.loras}
    opened = open_base(base, revision=revision, trust_remote_code=trust_remote_code)
    _same_architecture(opened.architecture, bundle, base)
    known = {name for name, _ in opened.model.named_modules()}
    for module, name in modules.items():
        if name is None and match_module(module, known) is None:
            raise MismatchError(f"{base} has no module {module}, which the adapter in {adapter} adapts")
    names = [name for name in modules.values() if name is not None]
    layers = {name: _layer(bundle, name) for name in names}
    weights = opened.weights(list(layers.values()))
    tensors: dict[str, torch.Tensor] = {}
    records: dict[str, CorrectedLayer] = {}
    for number, module in enumerate(trained.loras, 1):
        name = modules[module]
        if name is not None:
            corrected = _correct_layer(trained, bundle, weights, module, layers[name], clamp, device)
            keys = trained.loras[module]
            dtypes = {key: trained.tensors.spec(key).dtype for key in (keys.A, keys.B)}
            tensors |= {
                keys.A: corrected.A.to(dtypes[keys.A]).cpu(),
                keys.B: corrected.B.to(dtypes[keys.B]).cpu(),
            }
            records[module] = _record(trained, module, corrected)
        progress(Step("correct", number, len(trained.loras), module))
    unchanged = [key for key in trained.tensors.names() if key not in tensors]
    if output is not None:
        tensors |= {key: trained.read(key) for key in unchanged}
        with new_folder(output, overwrite=overwrite) as folder:
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
    for resource in (trained, bundle, opened.tensors):
        resource.close()
    return CorrectionResult(output, records, unchanged)


def _correct_layer(
    trained: Adapter,
    bundle: Emulator,
    weights: ModelWeights,
    module: str,
    layer: Layer,
    clamp: float | None,
    device: str,
) -> Correction:
    stored = weights.source_of[f"{layer.name}.weight"]
    W = weights.load([stored])[stored]
    if weights.hashes[stored] != bundle.layers[layer.name].weight_hash:
        raise MismatchError(
            f"{stored} is not the weight that the emulator in {bundle.folder} was made from "
            f"({bundle.manifest.base.id}); pass that very model as --base"
        )
    A, B = (tensor.to(device) for tensor in trained.pair(module))
    if (A.shape[1], B.shape[0]) != (layer.in_features, layer.out_features):
        raise MismatchError(
            f"the LoRA pair of {module} is for {B.shape[0]} x {A.shape[1]}, the emulator's layer is "
            f"{layer.out_features} x {layer.in_features}; the adapter was trained on another model"
        )
    try:
        scaling = trained.loras[module].scaling
        return correct_lora(A, B, scaling, oriented(layer, W), *bundle.factors(layer.name), clamp=clamp)
    except NumericalError as error:
        raise NumericalError(f"layer {module}: {error}") from error


def _refuse_unsupported(trained: Adapter, bundle: Emulator) -> None:
    """What cannot be corrected exactly is refused rather than transferred wrongly."""
    config, folder = trained.config, trained.folder
    reasons = {
        "use_dora": "DoRA's magnitudes belong to the emulator's weights",
        "lora_bias": "a LoRA bias cannot be merged into layers without bias",
        "use_qalora": "QA-LoRA pools its inputs",
        "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
        "layer_replication": "replicated layers have no counterpart in the base",
    }
    for key, reason in reasons.items():
        if config.get(key):
            raise UnsupportedError(f"{folder} was trained with {key}: {reason}; train with plain LoRA or rsLoRA")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f'{folder} was trained with bias={config["bias"]!r}; train with bias="none"')
    for key in trained.other_tensors:
        module, _, part = key.removeprefix(PREFIX).rpartition(".")
        if part in ("U", "S", "Vh") or (part == "weight" and match_module(module, bundle.layers) is not None):
            raise UnsupportedError(
                f"{folder} saves {module} as a whole (modules_to_save), but the emulator holds it as factors; "
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
