"""The Python file in an emulator folder: it lets any trainer load the emulator with `trust_remote_code=True`.

The generated classes bear new names (`EmlocLlamaForCausalLM`), since trainers look for `architectures[0]` among
the classes of transformers first, and would then load factored layers into a stock model.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Collection
from typing import Any

from emloc_tools.errors import UnsupportedError
from emloc_tools.models import four_bits, lowrank_experts, lowrank_layers, lowrank_modules
from emloc_tools.models.auto_classes import Fitting, fitting_classes

FILE = "modeling_emloc"
PASTED = (four_bits, lowrank_layers, lowrank_experts, lowrank_modules)  # each needs those before it alone
OWN_IMPORTS = re.compile(r"(from emloc_tools\.models\.\w+ import .*\n)+\n")

HEADER = '''"""An EMLoC emulator written by emloc-tools: {architecture} with low-rank layers. Self-contained.

Load it with the Auto classes of transformers and trust_remote_code=True, train a LoRA on it with any trainer, then run
`emloc-tools correct` to obtain the LoRA for the original model.
"""
'''

CLASS = '''

class Emloc{name}({parents}{name}):
    """{name} with the layers of config.emloc["ranks"] factored."""

    def __init__(self, config, *args, **kwargs):
{first}        super().__init__(config, *args, **kwargs)
        factor_layers(self, {ranks})
'''
STOCK = "RefusesExperts, InitialisedAsItsBase, transformers."
ALL_RANKS = 'config.emloc["ranks"]'
# A class may be a part of the model only, such as the decoder; nothing is then asked of the other part's layers.
SOME_RANKS = '{{name: rank for name, rank in config.emloc["ranks"].items() if not (name + ".").startswith({lacks!r})}}'
# Versions of transformers differ in the heads that they know.
IF_KNOWN = """

if hasattr(transformers, "{name}"):
{indented}"""
REQUIRE = "        require_transformers_5()\n"
# Without experts the same text would make transformers ask for what the model does not have.
EXPERTS = """

# transformers offers the experts' implementations to models in whose file it finds the text @use_experts_implementation
"""


def emulator_name(architecture: str) -> str:
    """The name of the emulator's class for a model class."""
    return f"Emloc{architecture}"


def modeling_source(
    config: Any, architecture: str, layers: Collection[str], stored: Collection[str], *, fused: bool = False
) -> tuple[str, dict[str, str]]:
    """The text of the modeling file, and the `auto_map` for config.json: every Auto class that can load the emulator.

    `layers` are the layers to factor, `stored` the names of the base's tensors. `fused` says that the model holds
    experts as no transformers before 5 does; the file then refuses those versions. Raises `UnsupportedError` for an
    architecture outside transformers.
    """
    import transformers

    if not hasattr(transformers, architecture):
        raise UnsupportedError(
            f"{architecture} is not part of transformers; its emulator could not be loaded by trainers"
        )
    autos = fitting_classes(config, layers, stored)
    classes = {fitting.name: fitting for fitting in (Fitting(architecture), *autos.values())}
    text = HEADER.format(architecture=architecture)
    text += f"\n{layers_source()}\n{EXPERTS if fused else ''}"
    text += "".join(_class(classes[name], fused, always=name == architecture) for name in sorted(classes))
    return text, {auto: f"{FILE}.{emulator_name(fitting.name)}" for auto, fitting in autos.items()}


def modeling_of_own_code(architecture: str, module: str, autos: Collection[str]) -> tuple[str, dict[str, str]]:
    """The same for a base whose class is in the file `<module>.py` beside the modeling file."""
    text = HEADER.format(architecture=architecture).replace("Self-contained", f"Needs {module}.py")
    text += f"\n{layers_source()}\n\n\nfrom .{module} import {architecture}\n"
    text += CLASS.format(name=architecture, parents="RefusesExperts, LoadsWholly, ", first="", ranks=ALL_RANKS)
    return text, dict.fromkeys(autos, f"{FILE}.{emulator_name(architecture)}")


def _class(fitting: Fitting, fused: bool, *, always: bool) -> str:
    """The text of one class; `always` says that it is the base's own, without which the file is of no use."""
    ranks = SOME_RANKS.format(lacks=fitting.lacks) if fitting.lacks else ALL_RANKS
    parents = f"LoadsWholly, {STOCK}" if always else STOCK  # another class may have a head of its own, which is new
    text = CLASS.format(name=fitting.name, parents=parents, first=REQUIRE if fused else "", ranks=ranks)
    return text if always else IF_KNOWN.format(name=fitting.name, indented=textwrap.indent(text.lstrip("\n"), "    "))


def layers_source() -> str:
    """The low-rank layers as text that needs nothing of emloc-tools."""
    return "\n\n\n".join(OWN_IMPORTS.sub("", _without_docstring(inspect.getsource(module))) for module in PASTED)


def _without_docstring(source: str) -> str:
    """A module's text after its docstring, which describes the module here and not its copy."""
    return source.split('"""', 2)[2].strip("\n")
