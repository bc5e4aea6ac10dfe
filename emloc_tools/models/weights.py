"""From checkpoint tensors to model tensors: names and layouts on disk often differ from those in the model.

transformers converts checkpoints on loading (renamed keys, experts fused into one tensor). Its own conversion rules
are applied here, tensor by tensor, so that one unit of the model can be read at a time. These are internals of
transformers: this file uses them, and `mxfp4` one more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emloc_tools.errors import MismatchError, NumericalError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder, content_hash

Reader = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one or more model tensors come from checkpoint tensors: a plain copy, or a converter of transformers.

    `parts` are the (converter pattern, checkpoint name) pairs; a copy has one, without pattern.
    """

    first: str
    parts: tuple[tuple[str | None, str], ...]
    converter: Any = None


class ModelWeights:
    """The checkpoint of `model` (on meta), addressed by the names of the model's parameters and buffers.

    `ignored` are checkpoint tensors that the model does not use. With `convert=False` names must agree as they are.
    Tied parameters share one source: `source_of` maps every name to the one that is stored. `hashes` collects the
    content hashes of the stored tensors in `hashed` as they are loaded. Parameters that the checkpoint lacks are an
    error, but for those that `may_lack(name)` allows: they are in `missing`, and have no source.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: TensorFolder,
        *,
        convert: bool = True,
        hashed: Collection[str] = (),
        may_lack: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.model, self.tensors = model, tensors
        self._hashed = frozenset(hashed)
        self.hashes: dict[str, str] = {}
        self._targets: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._targets.update(model.named_buffers(remove_duplicate=False))
        self._recipes: dict[str, Recipe] = {}
        self.ignored: list[str] = []
        self.missing: list[str] = []
        self._may_lack = may_lack
        self._plan(_conversions(model) if convert else None)
        self.source_of = self._resolve_ties(set(model.state_dict()))

    def load(self, names: Collection[str], read: Reader | None = None) -> dict[str, torch.Tensor]:
        """The stored tensors `names`, in their stored dtype; each checkpoint tensor is read once per call.

        `read` may place plain copies into memory of the caller's choice. NaN and infinity are refused.
        """
        loaded: dict[str, torch.Tensor] = {}
        for recipe in {id(self._recipes[name]): self._recipes[name] for name in names}.values():
            produced = self._apply(recipe, read or self.tensors.read)
            loaded.update({name: tensor for name, tensor in produced.items() if name in names})
        for name, tensor in loaded.items():
            self._require_shape(name, tensor)
            require_finite(name, tensor)
            if name in self._hashed and name not in self.hashes:
                self.hashes[name] = content_hash(tensor)
        return loaded

    def copied_bytes(self, names: Collection[str]) -> list[int]:
        """The sizes in bytes of those of the stored tensors `names` that are plain copies."""
        recipes = [self._recipes[name] for name in names]
        return [self.tensors.spec(recipe.parts[0][1]).nbytes for recipe in recipes if recipe.converter is None]

    def stored_spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a stored tensor, without reading it."""
        tensor = self._apply(self._recipes[name], self._on_meta)[name]
        return tensor.dtype, tuple(tensor.shape)

    def stored_names(self) -> list[str]:
        """Every model tensor that the checkpoint holds, tied ones once, sorted."""
        return sorted(set(self.source_of.values()))

    def copied_from(self, name: str) -> str | None:
        """The checkpoint tensor that the stored tensor `name` is a plain copy of; None where it is converted."""
        recipe = self._recipes[name]
        return recipe.parts[0][1] if recipe.converter is None else None

    def converted(self) -> dict[str, str]:
        """The checkpoint tensors that are converted, each with the model tensor (or the first) that it goes into."""
        recipes = [recipe for recipe in self._recipes.values() if recipe.converter is not None]
        return {key: recipe.first for recipe in recipes for _, key in recipe.parts}

    def _plan(self, conversions: _Conversions | None) -> None:
        groups: dict[str, list[tuple[str | None, str]]] = {}
        for key in sorted(self.tensors.weight_map, key=conversions.order if conversions else None):
            name, pattern = conversions.rename(key, self._targets) if conversions else (key, None)
            if name in self._targets:
                groups.setdefault(name, []).append((pattern, key))
            else:
                self.ignored.append(key)
        for name, parts in groups.items():
            if parts[0][0] is None:
                self._recipes[name] = Recipe(name, (parts[-1],))
                self.ignored += [key for _, key in parts[:-1]]  # the same tensor under an older name
                continue
            assert conversions is not None  # only conversions give patterns
            recipe = Recipe(name, tuple(parts), conversions.converters[parts[0][0]])
            for produced, tensor in self._dry_run(recipe).items():
                if produced in self._targets:
                    self._require_shape(produced, tensor)
                    self._recipes[produced] = recipe

    def _dry_run(self, recipe: Recipe) -> dict[str, torch.Tensor]:
        """The model tensors that a recipe gives, on meta."""
        try:
            return self._apply(recipe, self._on_meta)
        except (RuntimeError, ValueError, IndexError) as error:
            raise MismatchError(
                f"{recipe.first} cannot be made from its {len(recipe.parts)} tensors, such as {recipe.parts[0][1]}, "
                f"so the checkpoint is incomplete or damaged: {error}"
            ) from error

    def _require_shape(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.shape != self._targets[name].shape:
            message = f"{list(tensor.shape)} in the checkpoint, {list(self._targets[name].shape)} in the model"
            raise MismatchError(f"{name} has shape {message}; config.json and weights do not belong together")

    def _apply(self, recipe: Recipe, read: Reader) -> dict[str, torch.Tensor]:
        if recipe.converter is None:
            return {recipe.first: read(recipe.parts[0][1])}
        converter = copy.deepcopy(recipe.converter)
        for pattern, key in recipe.parts:
            converter.add_tensor(recipe.first, key, pattern, lambda key=key: self._source(key, read))
        produced = converter.convert(recipe.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in produced.items()}

    def _source(self, key: str, read: Reader) -> torch.Tensor:
        # A converter keeps its sources while it stacks them: never in memory that the caller reuses.
        return self._on_meta(key) if read == self._on_meta else self.tensors.read(key)

    def _on_meta(self, key: str) -> torch.Tensor:
        spec = self.tensors.spec(key)
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    def _resolve_ties(self, persistent: set[str]) -> dict[str, str]:
        same: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            same.setdefault(id(parameter), []).append(name)
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        source_of = {
            name: name for name, _ in self.model.named_buffers() if name in self._recipes and name in persistent
        }
        for names in same.values():
            stored = [name for name in names if name in self._recipes]
            stored += [tied[name] for name in names if tied.get(name) in self._recipes]
            if not stored and all(self._may_lack(name) for name in names):
                self.missing += names
                continue
            if not stored:
                raise MismatchError(
                    f"{names[0]} is not in the checkpoint, and {type(self.model).__name__} needs it; "
                    "the checkpoint is incomplete or was saved from another model class"
                )
            source_of.update(dict.fromkeys(names, stored[0]))
            for name in dict.fromkeys(stored[1:]):
                if name in names and name != stored[0] and not self._equal(stored[0], name):
                    self._untie(name)
                    source_of[name] = name
        return source_of

    def _equal(self, first: str, second: str) -> bool:
        """Whether two stored tensors that the configuration ties are equal; only such copies are read twice."""
        one, other = (self._apply(self._recipes[name], self.tensors.read)[name] for name in (first, second))
        return one.dtype == other.dtype and torch.equal(one, other)

    def _untie(self, name: str) -> None:
        """Give `name` a parameter of its own, as transformers does where tied tensors are stored and differ."""
        owner, _, attribute = name.rpartition(".")
        parameter = self._targets[name]
        own = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
        self.model.get_submodule(owner)._parameters[attribute] = own


@dataclass(frozen=True)
class _Conversions:
    """The renamings and converters that transformers applies to a model's checkpoint."""

    renamings: list[Any]
    converter_list: list[Any]
    converters: dict[str, Any]
    prefix: str
    order: Callable[[str], Any]
    rename_key: Callable[..., tuple[str, str | None]]

    def rename(self, key: str, targets: dict[str, torch.Tensor]) -> tuple[str, str | None]:
        """The model's name of a checkpoint key, and the converter pattern that it matched."""
        name, pattern = self.rename_key(key, self.renamings, self.converter_list, self.prefix, targets)
        if name not in targets and key in targets:  # saved in the model's own names
            return key, None
        return name, pattern


def _conversions(model: nn.Module) -> _Conversions | None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise UnsupportedError(
            f"this transformers has no checkpoint conversions where they are expected: {error}"
        ) from error
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return _Conversions(
        renamings=[transform for transform in transforms if isinstance(transform, WeightRenaming)],
        converter_list=converters,
        converters={pattern: converter for converter in converters for pattern in converter.source_patterns},
        prefix=model.base_model_prefix,
        order=dot_natural_key,
        rename_key=rename_source_key,
    )


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN, infinity, and 8-bit floats. `aminmax` needs no temporary tensor and carries NaN through."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.dtype.itemsize == 1:
        raise UnsupportedError(
            f"the weight {name} is stored in {tensor.dtype}; use the model's full-precision (bf16, fp16, fp32) release"
        )
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise NumericalError(f"the weight {name} holds NaN or infinity; the checkpoint is damaged")
