"""Adapters read under other names than those in their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from emloc_tools.files.adapter import CONFIG, MANIFEST, MARK, Adapter
from emloc_tools.files.adapter_keys import parse_key
from emloc_tools.files.diffusers_lora import WEIGHTS, DiffusersLora, open_adapter
from emloc_tools.files.manifest import AdapterManifest
from emloc_tools.files.tensors import TensorFolder, TensorSpec

Naming = Callable[[Adapter, Sequence[str]], Mapping[str, str]]


class RenamedTensors(TensorFolder):
    """The tensors of another folder under new names; `stored` maps these to its own."""

    def __init__(self, tensors: TensorFolder, stored: Mapping[str, str]) -> None:
        super().__init__({new: tensors.weight_map[old] for new, old in stored.items()}, Path)
        self._tensors, self._stored = tensors, stored

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return replace(self._tensors.spec(self._stored[name]), name=name)

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor `name`; see `TensorFile.read`."""
        return self._tensors.read(self._stored[name], buffer)

    def metadata_of(self, file_name: str) -> dict[str, str]:
        """The `__metadata__` of the file."""
        return self._tensors.metadata_of(file_name)

    def close(self) -> None:
        """Release the file."""
        self._tensors.close()


class RenamedAdapter(Adapter):
    """A PEFT adapter whose tensors are called as `naming(adapter, stored names)` says: stored name to new name.

    `naming` sees the adapter's configuration, prefix and component; nothing else is read yet. No two new names may be
    equal. Opening checks pairs and shapes under the new names. `renamed` are the names that changed. The configuration
    speaks of the old ones: ranks and scalings are those that follow from them.
    """

    def __init__(self, folder: Path, naming: Naming) -> None:
        self._naming = naming
        super().__init__(folder)

    def new_module(self, module: str) -> str:
        """The new name of a module, by the one that its linear pair has in the file."""
        stored = f"{self.prefix}{module}.lora_A.weight"
        return self._module_of(self.renamed.get(stored, stored))

    def means_the_same(self, module: str) -> bool:
        """Whether rank and alpha of a module, by its new name, follow from the configuration by that name as well."""
        by_new_name = super()._value
        fields = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        return all(self._value(module, *names) == by_new_name(module, *names) for names in fields)

    def _check(self) -> None:
        try:
            names = self._naming(self, self.tensors.names())
            self.renamed = {old: new for old, new in names.items() if old != new}
            self._meant = {self._module_of(new): parse_key(old).paths()[-1] for old, new in self.renamed.items()}
            self.tensors = RenamedTensors(self.tensors, {new: old for old, new in names.items()})
        except BaseException:
            self.tensors.close()
            raise
        super()._check()

    def _module_of(self, name: str) -> str:
        return parse_key(name).path.removeprefix(self.prefix)

    def _value(self, module: str, key: str, pattern_key: str) -> float:
        meant = self._meant.get(module, module) if self._patterns[pattern_key] else module
        return super()._value(meant, key, pattern_key)

    def _read_corrected(self) -> AdapterManifest | None:
        """What `correct` wrote is checked under the names that it gave."""
        marked = MARK in self.tensors.metadata_of(self.weights_path.name)
        if not (self.renamed and (marked or (self.folder / MANIFEST).exists())):
            return super()._read_corrected()
        as_stored = open_adapter(self.folder)
        as_stored.close()
        return as_stored.manifest


class RenamedDiffusersLora(RenamedAdapter, DiffusersLora):
    """The same for a LoRA in the file of diffusers."""


def open_renamed(folder: Path, naming: Naming) -> RenamedAdapter:
    """The adapter in a folder, PEFT's or that of diffusers, under the names that `naming` gives its tensors."""
    if not (folder / CONFIG).exists() and (folder / WEIGHTS).exists():
        return RenamedDiffusersLora(folder, naming)
    return RenamedAdapter(folder, naming)
