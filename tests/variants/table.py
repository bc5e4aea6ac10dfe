"""Write the table of kinds of LoRA in docs/serving.md from the cases that are tested.

python -m tests.variants.table
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.variants.cases import CORRECTED, OTHER_METHODS, PASSED, REFUSED, REWRITING

PAGE = Path(__file__).parent.parent.parent / "docs" / "serving.md"
BEGIN, END = "<!-- variants: begin -->", "<!-- variants: end -->"


def rows() -> Iterable[tuple[str, str]]:
    """Each kind, and what `correct` does with it."""
    for variant in CORRECTED:
        yield variant.name, "corrected"
    yield "several adapters in one model", "each has a folder of its own, and is corrected by itself"
    for passed in PASSED:
        yield passed.name, f"corrected; passed on as it is: {passed.what}"
    for refused in REFUSED:
        yield refused.name, f"refused: {refused.why}"
    inits = ", ".join(name for name in REWRITING if name != "kasa")
    yield (
        f"`init_lora_weights`: {inits}, corda, loftq, lora_ga; `kasa_config`",
        ("not to be trained on an emulator, and refused: they rewrite the weights that they train on"),
    )
    yield f"other methods ({', '.join(OTHER_METHODS)}, …)", "refused: no LoRA"


def table() -> str:
    """The table as it stands in the page."""
    lines = ["| kind | `correct` |", "|---|---|", *(f"| {kind} | {what} |" for kind, what in rows())]
    return "\n".join(lines)


def page() -> str:
    """The page with the table in its place."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
