"""Names of tensors in adapters as programs write them: PEFT's own, with what wrappers and raw state dicts add to them.

A trainer that saves the state dict of a wrapped model, or leaves PEFT's prefix out, writes keys that no program finds
again, and most of them say nothing about it. A name is taken apart here; which module it means, its model knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, FSDP, checkpointing
LEADING = ("base_model.model", "base_model", "module")  # of PEFT, of half of it, of DataParallel; also several times
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
# PEFT's modules hold one LoRA for each name of an adapter, and leave the name out of the files that they save.
_LORA = re.compile(
    r"(?P<path>.+)\.(?P<kind>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<end>\.weight|\.bias)?"
)
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<part>[^.]+)")
_TOKENS = re.compile(r"(?P<path>.+)\.(?P<part>token_adapter\.trainable_tokens_delta)(?:\.(?P<adapter>[^.]+))?")
_BESIDE = re.compile(r"(?P<path>.+)\.(?P<part>base_layer\.[^.]+)")  # the adapted weight itself, as of embeddings


@dataclass(frozen=True)
class Key:
    """A tensor's name: the `path` of its module with all prefixes, and its `part` in PEFT's spelling.

    `adapter` is the name of the adapter in it, which PEFT's files never have. Wrappers are gone from the path.
    """

    path: str
    part: str
    adapter: str | None = None

    @property
    def of_lora(self) -> bool:
        """Whether the tensor belongs to a LoRA, and does not stand for a tensor of the model."""
        return self.part.startswith("lora_")

    def paths(self, component: str | None = None) -> list[str]:
        """The path, and what is left of it as leading parts are taken off one by one: the module is one of these.

        `component` is the part of a pipeline that the model is, whose name is such a part as well.
        """
        leading = LEADING if component is None else (*LEADING, component)
        found = [self.path]
        while (part := next((part for part in leading if found[-1].startswith(f"{part}.")), None)) is not None:
            found.append(found[-1].removeprefix(f"{part}."))
        return found


def parse_key(name: str) -> Key:
    """Take a tensor's name apart."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    if match := _LORA.fullmatch(name):
        end = "" if match["kind"] == MAGNITUDE else match["end"] or ""  # PEFT leaves it out when it saves
        return Key(match["path"], match["kind"] + end, match["adapter"])
    for pattern in (_SAVED, _TOKENS):
        if match := pattern.fullmatch(name):
            return Key(match["path"], match["part"], match["adapter"])
    if match := _BESIDE.fullmatch(name):
        return Key(match["path"], match["part"])
    path, _, part = name.rpartition(".")
    return Key(path, part)
