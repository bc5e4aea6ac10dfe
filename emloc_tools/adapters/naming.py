"""The names that an adapter's tensors have to have on a base, whatever they are called in its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from emloc_tools.errors import MismatchError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.adapter_keys import Key, parse_key
from emloc_tools.models.adapter_names import NamesInModel


class Naming:
    """Gives the tensors of an adapter the names under which PEFT finds them on `model`.

    `unclear` has, for tensors of a LoRA whose module the model does not have, or has several times, the modules that
    may be meant. They get PEFT's spelling alone, as new heads and the like do.
    """

    def __init__(self, model: nn.Module, component: str | None) -> None:
        self._model = NamesInModel(model, component)
        self.unclear: dict[str, list[str]] = {}

    def __call__(self, adapter: Adapter, names: Sequence[str]) -> Mapping[str, str]:
        """The new name of every tensor. Raises `MismatchError` for two that would be the same."""
        own = [name for name in names if adapter.component is None or name.startswith(adapter.prefix)]
        keys = {name: parse_key(name) for name in own}
        adapters = sorted({key.adapter for key in keys.values() if key.adapter is not None})
        if len(adapters) > 1:
            raise MismatchError(
                f"{adapter.folder} holds the tensors of several adapters, {', '.join(adapters)}; save them one by one"
            )
        new = {name: adapter.prefix + self._name(name, keys[name]) if name in keys else name for name in names}
        taken: dict[str, str] = {}
        for old, name in new.items():
            if name in taken:
                raise MismatchError(f"{adapter.folder} holds {taken[name]} and {old}, which would both become {name}")
            taken[name] = old
        return new

    def nearest(self, name: str) -> str:
        """A module of the model to show beside a tensor's name that means none."""
        return self._model.nearest(parse_key(name).path)

    def _name(self, name: str, key: Key) -> str:
        meant = self._model.meant(key)
        if len(meant) != 1 and key.of_lora:
            self.unclear[name] = meant
        module = meant[0] if len(meant) == 1 else key.paths()[-1]
        return f"{module}.{key.part}"
