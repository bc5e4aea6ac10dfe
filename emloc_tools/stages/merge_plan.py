"""What `merge` does to each tensor of the base's checkpoint, decided and checked before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

from torch import nn
from transformers.pytorch_utils import Conv1D

from emloc_tools.errors import MismatchError, UnsupportedError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.emulator import FACTORS, Emulator
from emloc_tools.files.manifest import FactoredLayer
from emloc_tools.files.tensors import content_hash
from emloc_tools.models.adapted import AdaptedModules, require_pair_shape
from emloc_tools.models.base import BaseModel
from emloc_tools.models.layers import describe
from emloc_tools.models.lora import match_module
from emloc_tools.models.weights import ModelWeights
from emloc_tools.records import Layer


@dataclass(frozen=True)
class Change:
    """What becomes of one checkpoint tensor: `saved` of the adapter replaces it, then the others are applied.

    `layer` is the linear layer whose weight it is, `lora` the adapter's name of that layer, `factored` whether the
    emulator holds its factors. An embedding is taken for the linear layer that has its weight: `embedding` is the
    adapter's name of it.
    """

    layer: Layer | None = None
    saved: str | None = None
    lora: str | None = None
    factored: bool = False
    embedding: str | None = None


def plan_changes(
    opened: BaseModel, weights: ModelWeights, trained: Adapter, bundle: Emulator | None
) -> dict[str, Change]:
    """The changes by checkpoint tensor; tensors that are not in it stay as they are.

    Raises `MismatchError` for names and shapes that the base does not have, `UnsupportedError` for weights that cannot
    be changed in the checkpoint: those that are converted on loading, and tied ones.
    """
    if bundle is not None and bundle.stacks:
        raise UnsupportedError(
            f"the emulator in {bundle.folder} holds experts as factors, towards which weights cannot be moved; correct "
            "the adapter and merge it without --emulator and --interpolate, or build an emulator with --exclude experts"
        )
    planner = _Planner(opened, weights, trained)
    planner.add_saved()
    for module in trained.loras:
        planner.add_lora(module)
    for module in trained.embeddings:
        planner.add_embedding(module)
    for name, record in bundle.layers.items() if bundle else ():
        planner.add_factored(name, record)
    return planner.changes


class _Planner:
    def __init__(self, opened: BaseModel, weights: ModelWeights, trained: Adapter) -> None:
        self._opened, self._weights, self._trained = opened, weights, trained
        self._adapted = AdaptedModules(opened.model, trained.folder, opened.source.id)
        self._modules = self._adapted.modules
        self.changes: dict[str, Change] = {}

    def add_saved(self) -> None:
        """Whole tensors of `modules_to_save`, and the weights that PEFT saves with adapted heads and embeddings."""
        pairs = {key for keys in self._trained.embeddings.values() for key in (keys.A, keys.B)}
        saved = {self._saved_name(key): key for key in self._trained.other_tensors if key not in pairs}
        for name, key in saved.items():
            source = self._weights.source_of[name]
            checkpoint = self._checkpoint_name(source, name)
            spec, expected = self._trained.tensors.spec(key), self._opened.tensors.spec(checkpoint)
            if spec.shape != expected.shape or not spec.dtype.is_floating_point:
                raise MismatchError(
                    f"{self._trained.folder} saves {name} as {spec.dtype} {list(spec.shape)}, in {self._base_id} it is "
                    f"{expected.dtype} {list(expected.shape)}; a model that was resized in training cannot be merged"
                )
            missing = [other for other in self._users(source) if other not in saved]
            copies = [saved[other] for other in self._users(source) if other in saved]
            if missing or len({content_hash(self._trained.tensors.read(copy)) for copy in copies}) > 1:
                self._refuse_tied(name, source)
            self._add(checkpoint, saved=key)

    def add_lora(self, module: str) -> None:
        """The pair of an adapted module."""
        name = self._adapted.get(module) or self._refuse_unknown(module)
        layer = self._linear(name)
        shape = (layer.out_features, layer.in_features)
        require_pair_shape(module, self._trained.pair_shape(module), shape, f"the layer of {self._base_id}")
        self._add(self._own_weight(name), layer=layer, lora=module)

    def add_embedding(self, module: str) -> None:
        """The pair of an adapted embedding, whose A and B are the transposes of a linear layer's B and A."""
        name = self._adapted.get(module) or self._refuse_unknown(module)
        embedding = self._modules[name]
        if not isinstance(embedding, nn.Embedding):
            raise UnsupportedError(f"{name} of {self._base_id} is a {type(embedding).__name__} and no embedding")
        rows, features = self._trained.pair_shape(module)
        shape = (embedding.num_embeddings, embedding.embedding_dim)
        if (rows, features) != shape:
            raise MismatchError(
                f"the LoRA pair of {module} is for {rows} x {features}, the embedding of {self._base_id} is "
                f"{shape[0]} x {shape[1]}; the adapter was trained on another model, or one that was resized"
            )
        layer = Layer(name, *shape, "linear", has_bias=False)
        self._add(self._own_weight(name), layer=layer, embedding=module)

    def add_factored(self, name: str, record: FactoredLayer) -> None:
        """A layer that the emulator holds as factors, adapted or not."""
        layer = self._linear(name) if name in self._modules else None
        shape = (record.out_features, record.in_features)
        if layer is None or (layer.out_features, layer.in_features) != shape:
            raise MismatchError(
                f"the emulator's layer {name} ({shape[0]} x {shape[1]}) is not in {self._base_id}; pass the model "
                "that it was made from as --base"
            )
        self._add(self._own_weight(name), layer=layer, factored=True)

    @property
    def _base_id(self) -> str:
        return self._opened.source.id

    def _add(self, checkpoint: str, **fields: object) -> None:
        change = self.changes.get(checkpoint, Change())
        if change.lora is not None and fields.get("lora") is not None:
            raise MismatchError(f"{self._trained.folder} adapts {change.lora} and {fields['lora']}, which are the same")
        self.changes[checkpoint] = replace(change, **fields)  # type: ignore[arg-type]

    def _linear(self, name: str) -> Layer:
        module = self._modules[name]
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UnsupportedError(f"{name} of {self._base_id} is a {type(module).__name__} and no linear layer")
        return describe(name, module)

    def _own_weight(self, name: str) -> str:
        """The checkpoint tensor that is the weight of this module alone."""
        source = self._weights.source_of[f"{name}.weight"]
        checkpoint = self._checkpoint_name(source, name)
        if len(self._users(source)) > 1:
            self._refuse_tied(f"{name}.weight", source)
        return checkpoint

    def _checkpoint_name(self, source: str, name: str) -> str:
        checkpoint = self._weights.copied_from(source)
        if checkpoint is None:
            raise UnsupportedError(
                f"{name} is made from other tensors when {self._opened.architecture} is loaded, so a change of it "
                "cannot be put into the checkpoint of the base; leave it out of target_modules and modules_to_save"
            )
        return checkpoint

    def _users(self, source: str) -> list[str]:
        return [name for name, other in self._weights.source_of.items() if other == source]

    def _saved_name(self, key: str) -> str:
        module, _, part = key.removeprefix(self._trained.prefix).rpartition(".")
        if ".lora_" in key or part == "trainable_tokens_delta":
            what = (
                "trained rows of an embedding" if part == "trainable_tokens_delta" else "not a pair of a linear layer"
            )
            raise UnsupportedError(
                f"{self._trained.folder} holds {key}, which is {what}; merge it with PEFT's merge_and_unload"
            )
        if part in FACTORS:
            raise UnsupportedError(
                f"{self._trained.folder} saves {module} as a whole (modules_to_save), but the emulator holds it as "
                "factors; leave it out of modules_to_save, or keep it dense with --exclude when building the emulator"
            )
        name = match_module(f"{module.removesuffix('.base_layer')}.{part}", self._weights.source_of)
        if name is None:
            raise MismatchError(
                f"{self._trained.folder} holds {key}, which {self._base_id} ({self._opened.architecture}) does not "
                "have; a new head cannot be merged into the base, keep the adapter beside it"
            )
        return name

    def _refuse_unknown(self, module: str) -> NoReturn:
        fused = self._weights.converted().get(f"{module}.weight")
        if fused is not None:
            raise UnsupportedError(
                f"{self._trained.folder} adapts {module}, which {self._opened.architecture} holds inside {fused}; a "
                "LoRA on fused experts cannot be merged, leave them out of target_modules"
            )
        self._adapted.refuse(module)

    def _refuse_tied(self, name: str, source: str) -> NoReturn:
        other = next(user for user in [*self._users(source), source] if user != name)
        raise UnsupportedError(
            f"{name} is tied to {other} in {self._base_id}: one dense tensor cannot be changed for one of them alone; "
            "use the adapter unmerged, or leave it out of target_modules and modules_to_save"
        )
