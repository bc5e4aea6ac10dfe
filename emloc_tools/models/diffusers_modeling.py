"""The Python file in an emulator of a model of diffusers, for `AutoModel` where emloc-tools is not installed.

There the low-rank layers and their loader come from the file itself. A class that stands for the base's own in
`auto_map` only leads to it: what is loaded is of the base's own class, whose name diffusers keys many things by.
"""

from __future__ import annotations

import inspect

from emloc_tools.models import diffusers_quantizer
from emloc_tools.models.modeling import FILE, emulator_name, layers_source

OWN_IMPORT = "from emloc_tools.models.lowrank_modules import factor_layers\n"

HEADER = '''"""An EMLoC emulator written by emloc-tools: {architecture} with low-rank layers. Self-contained.

Load it with the AutoModel of diffusers and trust_remote_code=True, train a LoRA on it with any trainer, then run
`emloc-tools correct` to obtain the LoRA for the original model.
"""
'''

CLASS = '''

register()


class {emulator}(diffusers.{architecture}):
    """Loads {architecture} with the layers of config.json's quantization_config factored."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return diffusers.{architecture}.from_pretrained(*args, **kwargs)
'''


def modeling_source(architecture: str) -> tuple[str, dict[str, str]]:
    """The text of the modeling file, and the `auto_map` for config.json."""
    loader = _without_docstring(diffusers_quantizer)
    emulator = emulator_name(architecture)
    text = (
        HEADER.format(architecture=architecture)
        + f"\n{layers_source()}\n\n\nimport diffusers\n"
        + loader.replace(OWN_IMPORT, "")
        + CLASS.format(emulator=emulator, architecture=architecture)
    )
    return text, {"AutoModel": f"{FILE}.{emulator}"}


def _without_docstring(module: object) -> str:
    """A module's text after its docstring, which describes the module here and not its copy."""
    return inspect.getsource(module).split('"""', 2)[2].strip("\n") + "\n"  # type: ignore[arg-type]
