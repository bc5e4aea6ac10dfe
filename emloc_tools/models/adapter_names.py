"""Which module of a model an adapter's name of it means, where the adapter was saved under other names.

Names differ by prefixes that wrappers and head classes add, by the renamings that transformers applies to checkpoints
(models that read images had other names before release 5), and by containers such as `language_model`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from torch import nn

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.adapter_keys import Key

CONTAINERS = frozenset({"model", "language_model", "text_model"})  # around the same blocks, in one or another order


class NamesInModel:
    """Finds modules of `model` by the names that adapters have for them; `component` is its place in a pipeline."""

    def __init__(self, model: nn.Module, component: str | None = None) -> None:
        self._component = component
        self.modules: list[str] = [name for name, module in model.named_modules() if hasattr(module, "weight")]
        self._known = frozenset(self.modules)
        self._convert = _checkpoint_renaming(model)
        self._by_essence: dict[str, list[str]] = {}
        for name in self.modules:
            self._by_essence.setdefault(_essence(name), []).append(name)

    def meant(self, key: Key) -> list[str]:
        """The modules that a key's path may mean: one, none, or several that fit equally well.

        The first kind of likeness that finds any decides: the same name; the name to which transformers renames it in
        checkpoints; one that differs by leading parts; one that differs by containers.
        """
        paths = key.paths(self._component)
        for found in (self._same(paths), self._converted(paths), self._prefixed(paths), self._moved(paths)):
            if found:
                return list(dict.fromkeys(found))
        return []

    def nearest(self, path: str) -> str:
        """A module to show beside a path that means none: the most similar, of the same last name if there is any."""
        leaf = path.rpartition(".")[2]
        same = [name for name in self.modules if name.rpartition(".")[2] == leaf]
        return difflib.get_close_matches(path, same or self.modules, n=1, cutoff=0.0)[0]

    def _same(self, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if path in self._known][:1]

    def _converted(self, paths: Iterable[str]) -> list[str]:
        renamed = [self._convert(f"{path}.weight").removesuffix(".weight") for path in paths]
        return self._same(renamed)

    def _prefixed(self, paths: Iterable[str]) -> list[str]:
        return next((found for path in paths if (found := self._differing_in_front(path))), [])

    def _differing_in_front(self, path: str) -> list[str]:
        return [name for name in self.modules if name.endswith(f".{path}") or path.endswith(f".{name}")]

    def _moved(self, paths: Iterable[str]) -> list[str]:
        return next((found for path in paths if (found := self._by_essence.get(_essence(path), []))), [])


def _essence(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in CONTAINERS)


def _checkpoint_renaming(model: nn.Module) -> Callable[[str], str]:
    """The name in `model` of a tensor in a checkpoint, by the renamings of transformers; see `weights`."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return lambda name: name
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError as error:
        raise UnsupportedError(
            f"this transformers has no checkpoint conversions where they are expected: {error}"
        ) from error
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    return lambda name: str(rename_source_key(name, renamings, [])[0])
