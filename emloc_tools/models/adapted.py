"""The modules of a model that the pairs of an adapter mean, and whether the pairs have their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from torch import nn

from emloc_tools.errors import MismatchError
from emloc_tools.models.lora import match_module


class AdaptedModules:
    """Finds the modules of `model` that the adapter in `folder` adapts. Messages call the model `owner`.

    Names may differ by a leading prefix, as those of a class with a head and one without do.
    """

    def __init__(self, model: nn.Module, folder: Path, owner: str) -> None:
        self._folder, self._owner = folder, owner
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules())
        self._weighted = {name for name, module in self.modules.items() if hasattr(module, "weight")}

    def get(self, module: str) -> str | None:
        """The model's name of an adapted module; None if it has no such module, or several."""
        return match_module(module, self._weighted)

    def find(self, module: str) -> str:
        """The model's name of an adapted module. Raises `MismatchError` if there is none."""
        name = self.get(module)
        if name is None:
            self.refuse(module)
        return name

    def refuse(self, module: str) -> NoReturn:
        """Raise the `MismatchError` for a module that the model does not have."""
        raise MismatchError(
            f"the adapter in {self._folder} adapts {module}, which {self._owner} does not have; it was trained on "
            "another model"
        )


def require_pair_shape(module: str, pair: tuple[int, int], expected: tuple[int, int], what: str) -> None:
    """Refuse a pair whose product `B A` has another shape `(out, in)` than the weight that it is added to.

    `what` is how the message calls that weight's layer.
    """
    if pair != expected:
        raise MismatchError(
            f"the LoRA pair of {module} is for {pair[0]} x {pair[1]}, {what} is {expected[0]} x {expected[1]}; the "
            "adapter was trained on another model"
        )
