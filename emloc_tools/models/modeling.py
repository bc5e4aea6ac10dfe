"""The Python file in an emulator folder: it lets any trainer load the emulator with `trust_remote_code=True`.

The generated classes bear new names (`EmlocLlamaForCausalLM`), since trainers look for `architectures[0]` among
the classes of transformers first, and would then load factored layers into a stock model.
"""

from __future__ import annotations

import inspect
from typing import Any

from emloc_tools.errors import UnsupportedError
from emloc_tools.models import lowrank_modules

FILE = "modeling_emloc"
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageClassification",
)

HEADER = '''"""An EMLoC emulator written by emloc-tools: {architecture} with low-rank layers. Self-contained.

Load it with the Auto classes of transformers and trust_remote_code=True, train a LoRA on it with any trainer, then run
`emloc-tools correct` to obtain the LoRA for the original model.
"""
'''

CLASS = '''

class Emloc{name}(transformers.{name}):
    """{name} with the layers of config.emloc["ranks"] factored."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        factor_layers(self, config.emloc["ranks"])
'''


def emulator_name(architecture: str) -> str:
    """The name of the emulator's class for a model class."""
    return f"Emloc{architecture}"


def modeling_source(config: Any, architecture: str) -> tuple[str, dict[str, str]]:
    """The text of the modeling file, and the `auto_map` for config.json: every Auto class that can load the tensors.

    Raises `UnsupportedError` for an architecture outside transformers.
    """
    import transformers

    if not hasattr(transformers, architecture):
        raise UnsupportedError(
            f"{architecture} is not part of transformers; its emulator could not be loaded by trainers"
        )
    # Some classes call the body by another name (LlamaForQuestionAnswering), and then find no tensor of the checkpoint.
    prefix = getattr(transformers, architecture).base_model_prefix
    fitting = {auto: cls for auto in AUTO_CLASSES if (cls := _class_for(auto, config))}
    classes = {auto: cls for auto, cls in fitting.items() if getattr(transformers, cls).base_model_prefix == prefix}
    own = _without_docstring(inspect.getsource(lowrank_modules))
    names = sorted({*classes.values(), architecture})
    text = (
        HEADER.format(architecture=architecture)
        + "\n"
        + own
        + "\n"
        + "".join(CLASS.format(name=name) for name in names)
    )
    return text, {auto: f"{FILE}.{emulator_name(name)}" for auto, name in classes.items()}


def _class_for(auto: str, config: Any) -> str | None:
    """The model class that an Auto class would choose for the configuration."""
    import transformers

    mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
    try:
        chosen = mapping[type(config)]
    except KeyError:
        return None
    return (chosen[0] if isinstance(chosen, (list, tuple)) else chosen).__name__  # type: ignore[no-any-return]


def _without_docstring(source: str) -> str:
    """A module's text after its docstring, which describes the module here and not its copy."""
    return source.split('"""', 2)[2].strip("\n")
