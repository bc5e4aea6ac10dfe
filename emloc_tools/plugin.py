"""Lets diffusers load emulators once emloc_tools is imported, without importing diffusers, which takes seconds.

diffusers looks up how to load a model by the `quant_method` in its configuration, in a table that no installed package
can add to from outside. So the entry is made as soon as the module with the table is imported, by whomever.
"""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

TABLE = "diffusers.quantizers.auto"


def install() -> None:
    """Register now if diffusers is imported already, else when it is."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the module with the table as Python would, and adds our entry after it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TABLE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """A release of diffusers without such a table must still work for everything else."""
    try:
        from emloc_tools.models.diffusers_quantizer import register

        register()
    except (ImportError, AttributeError) as error:
        warnings.warn(f"this diffusers cannot load emulators of emloc-tools: {error}", stacklevel=2)
