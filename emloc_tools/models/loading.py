"""Load an emulator in Python without running the code in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from emloc_tools.errors import UnsupportedError
from emloc_tools.files.emulator import Emulator
from emloc_tools.models.diffusion import diffusers_class
from emloc_tools.models.lowrank_modules import InitialisedAsItsBase, LoadsWholly, RefusesExperts, factor_layers


def load_emulator(path: str | Path, **options: Any) -> Any:
    """The emulator as a model of its library, like `from_pretrained(path, trust_remote_code=True, **options)`.

    The folder is checked first, and its modeling file is not executed. Raises `FormatError` if it is not an emulator.
    """
    emulator = Emulator(Path(path))
    emulator.close()
    architecture = emulator.manifest.base.architecture
    if emulator.library == "diffusers":  # which knows how to load it since emloc_tools was imported
        return diffusers_class(architecture, str(path)).from_pretrained(path, **options)  # type: ignore[attr-defined]
    if emulator.code:
        raise UnsupportedError(
            f"the emulator in {path} is of a model with code of its own, which is never run from here; load it by "
            "transformers' Auto classes with trust_remote_code=True, if you trust that code"
        )
    cls = emulator_class(architecture)
    return cls.from_pretrained(path, **options)  # type: ignore[attr-defined]


def emulator_class(architecture: str) -> type[nn.Module]:
    """The model class `architecture` of transformers, with the layers of `config.emloc` factored."""
    import transformers

    base = getattr(transformers, architecture, None)
    if base is None:
        raise UnsupportedError(f"transformers {transformers.__version__} does not know {architecture}")

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        factor_layers(self, config.emloc["ranks"])

    # The class keeps its name and does not count as transformers' own, so that no key conversions are applied.
    return type(
        f"Emloc{architecture}",
        (LoadsWholly, RefusesExperts, InitialisedAsItsBase, base),
        {"__init__": __init__, "__module__": __name__},
    )
