"""emloc-tools: train a LoRA on a light low-rank emulator of a model, then correct it for the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emloc_tools.plugin import install

if TYPE_CHECKING:
    from emloc_tools.models.loading import load_emulator
    from emloc_tools.models.recording import record_inputs

__version__ = "0.1.0"
__all__ = ["__version__", "load_emulator", "record_inputs"]

install()


def __getattr__(name: str) -> Any:
    """Import what is exported on first use, so that `import emloc_tools` does not import torch."""
    if name == "load_emulator":
        from emloc_tools.models.loading import load_emulator

        return load_emulator
    if name == "record_inputs":
        from emloc_tools.models.recording import record_inputs

        return record_inputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
