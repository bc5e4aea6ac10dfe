"""The messages that docs/troubleshooting.md explains are those that the package shows."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.docs.test_docs import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"


@cache
def texts() -> frozenset[str]:
    """Every string in the package's code, with `…` for what is filled in, docstrings aside."""
    found = set()
    for path in (ROOT / "emloc_tools").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.add(node.value)
    return frozenset(found)


def explained() -> list[str]:
    """The messages that are headings of the page."""
    return re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def is_shown(message: str) -> bool:
    """Whether a text of the package has the same words where the message has words; `…` may be more of the text."""
    pattern = re.compile(".*?".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    return any(pattern.fullmatch(text) for text in texts())


def test_every_message_that_is_explained_is_in_the_code() -> None:
    assert len(explained()) > 25
    assert [message for message in explained() if not is_shown(message)] == []


def test_a_message_of_other_words_is_found() -> None:
    """The control."""
    message = "the adapter in … is corrected already; use it with its base as it is"
    assert is_shown(message)
    assert not is_shown(message.replace("already", "twice"))
    assert not is_shown(f"{message}, please")
