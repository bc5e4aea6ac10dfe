"""What a record says, as text: plain, or a conversation as the base's chat template writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True)
class Texts:
    """A record's whole text, and the part at its beginning that a loss skips.

    `special` says whether the tokenizer's special tokens are to be added; chat templates write their own.
    """

    prompt: str
    whole: str
    special: bool


def texts_of(record: Mapping[str, Any], writer: Any) -> Texts:
    """The texts of a record with `text`, `messages`, or `prompt` and `completion`.

    `writer` is the tokenizer or processor whose chat template writes conversations. Raises `ValueError` or `TypeError`
    for another record, and what the template raises.
    """
    if "messages" in record:
        return Texts("", _chat(record["messages"], writer, False), False)
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return Texts(_chat(prompt, writer, True), _chat(prompt + completion, writer, False), False)
        begin = text_in(record, "prompt")
        return Texts(begin, begin + text_in(record, "completion"), True)
    if "text" in record:
        return Texts("", text_in(record, "text"), True)
    raise ValueError(f"found the keys {sorted(record)}, expected `text`, `messages`, or `prompt` and `completion`")


def text_in(record: Mapping[str, Any], key: str) -> str:
    """A string of a record. Raises `TypeError` for anything else."""
    if not isinstance(record[key], str):
        raise TypeError(f"`{key}` is {type(record[key]).__name__}, expected a string")
    return cast(str, record[key])


def _chat(messages: Any, writer: Any, ask: bool) -> str:
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` must be a list of at least one message")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise ValueError("every message must be an object with a `role`; templates skip others without an error")
    if not getattr(writer, "chat_template", None):
        raise ValueError("the base's tokenizer has no chat template, which `messages` need; use `text` instead")
    return cast(str, writer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
