"""The models and adapters whose losses are compared, opened and checked before any of them runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.json_files import read_json
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.adapted import AdaptedModules, require_pair_shape
from emloc_tools.models.base import open_base
from emloc_tools.models.diffusion import DiffusersConfig, diffusers_class, stored_dtype
from emloc_tools.models.labels import classifies_sequences
from emloc_tools.models.layers import describe
from emloc_tools.models.loading import emulator_class
from emloc_tools.models.lora import LoraPair
from emloc_tools.models.lowrank_modules import factor_layers
from emloc_tools.models.skeleton import build_skeleton, compute_dtype, load_config, predicts_next_token
from emloc_tools.models.source import Source
from emloc_tools.models.weights import ModelWeights


@dataclass(frozen=True)
class Target:
    """A model to evaluate."""

    name: str
    is_emulator: bool
    source: Source
    model: nn.Module
    weights: ModelWeights
    tensors: TensorFolder
    classifies: bool = False  # predicts labels of whole samples, not tokens
    config: Any = None  # of an emulator that its folder's configuration does not tell


def open_base_target(
    base: str, revision: str | None, dtype: str, trust_remote_code: bool, *, denoisers: bool = False
) -> Target:
    """The base. Raises `UnsupportedError` for a model that predicts neither the next token nor a label.

    With `denoisers` a model of diffusers is taken as well.
    """
    opened = open_base(base, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    if not (denoisers and opened.library == "diffusers"):
        _require_predictions(opened.architecture, opened.config)
    return Target(
        "base",
        False,
        opened.source,
        opened.model,
        opened.weights(),
        opened.tensors,
        classifies_sequences(opened.architecture),
    )


def open_emulator_target(folder: Path, dtype: str) -> Target:
    """The emulator, whose own code is not run. Raises as `open_base_target`."""
    bundle = Emulator(folder)
    if bundle.code:
        raise UnsupportedError(
            f"the emulator in {folder} is of a model with code of its own, which is never run from an emulator; "
            "measure the base alone"
        )
    architecture = bundle.manifest.base.architecture
    source = Source(str(folder), None, folder)
    if bundle.library == "diffusers":
        return _open_denoiser(bundle, source, architecture, dtype)
    _require_predictions(architecture)
    config = load_config(source)
    model = build_skeleton(emulator_class(architecture), config, dtype=compute_dtype(config, dtype))
    weights = ModelWeights(model, bundle.tensors, convert=False)
    return Target("emulator", True, source, model, weights, bundle.tensors, classifies_sequences(architecture))


def _open_denoiser(bundle: Emulator, source: Source, architecture: str, dtype: str) -> Target:
    values = read_json(bundle.folder / "config.json", "emulator config")
    del values["quantization_config"]  # by which diffusers knows the emulator
    config = DiffusersConfig(architecture, values, stored_dtype(bundle.tensors))
    cls = diffusers_class(architecture, source.id)
    model = build_skeleton(cls, config, dtype=compute_dtype(config, dtype))
    factor_layers(model, {name: record.rank for name, record in bundle.layers.items()})
    weights = ModelWeights(model, bundle.tensors, convert=False)
    return Target("emulator", True, source, model, weights, bundle.tensors, config=config)


def load_pairs(adapter: Adapter) -> dict[str, LoraPair]:
    """The pairs of an adapter by module. Raises `UnsupportedError` if it holds anything else that was trained.

    PEFT saves a copy of a head that it adapts, which belongs to the model and is frozen; see `require_shapes`.
    """
    copies = {f"{adapter.prefix}{module}.base_layer.{part}" for module in adapter.loras for part in ("weight", "bias")}
    others = [name for name in adapter.other_tensors if name not in copies]
    if others:
        raise UnsupportedError(
            f"{adapter.folder} holds {others[0]} beside LoRA pairs, of "
            "modules_to_save or of an adapted embedding; losses cannot be measured with such tensors yet"
        )
    return {module: LoraPair(*adapter.pair(module), keys.scaling) for module, keys in adapter.loras.items()}


def require_shapes(target: Target, path: Path, pairs: Mapping[str, LoraPair]) -> None:
    """Refuse the adapter in `path` if one of its pairs does not fit the model."""
    modules = AdaptedModules(target.model, path, f"the {target.name}")
    for name, pair in pairs.items():
        module = modules.find(name)
        layer = describe(module, modules.modules[module])
        shape = (layer.out_features, layer.in_features)
        require_pair_shape(name, (pair.B.shape[0], pair.A.shape[1]), shape, f"the layer of the {target.name}")


def _require_predictions(architecture: str, config: Any = None) -> None:
    if not (predicts_next_token(architecture, config) or classifies_sequences(architecture)):
        raise UnsupportedError(
            f"{architecture} does not predict the next token; losses are measured for causal language models and "
            "sequence classifiers"
        )
