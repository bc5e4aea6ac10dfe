"""emloc-tools: train a LoRA on a light low-rank emulator of a model, then correct it for the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emloc_tools.models.loading import load_emulator

__version__ = "0.1.0"
__all__ = ["__version__", "load_emulator"]


def __getattr__(name: str) -> Any:
    """Import `load_emulator` on first use, so that `import emloc_tools` does not import torch."""
    if name == "load_emulator":
        from emloc_tools.models.loading import load_emulator

        return load_emulator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
