"""The command lines in the pages' blocks of bash, and where each of them is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.docs.test_docs import PAGES, ROOT, blocks

# Pages that are gone through by a test of their own, which runs all of emloc-tools that is in their blocks.
BY_OTHERS = {
    "docs/tutorial.md": "tests/docs/test_docs.py",
    "docs/diffusion.md": "tests/diffusion/test_page.py",
    "docs/vision-language.md": "tests/stages/test_vision_language.py",
    "docs/hub.md": "tests/hub/test_page.py",
}
# Pages whose lines were written by the program that ran them; `make test-trainers` runs them again.
RECORDED = "docs/trainers/"
# Pages that tests/docs/test_pages_run.py goes through.
HERE = (
    "README.md",
    "docs/24gb.md",
    "docs/experts.md",
    "docs/heads.md",
    "docs/machines.md",
    "docs/plan.md",
    "docs/report.md",
    "docs/serving.md",
    "docs/trainers.md",
)
# Trainers, in whose place those tests put a LoRA. tests/external runs `trl sft` itself, where it is installed.
TRAINERS = ("trl sft ", "python train.py")
# How lines begin that no test runs, and why.
NOT_RUN = {
    "make ": "sets up an environment or runs the tests themselves",
    "pip install ": "needs a package registry",
    "python -m benchmarks.transfer ": "takes hours",
    "source .venv": "is there to find emloc-tools, which the tests find by themselves",
    "mkdir tutorial ": "the test of the tutorial makes its own folder",
    "cp -r ../demo-run": "the test of the tutorial copies what is shipped",
    ".venv/bin/python -m tests.external.environments ": "downloads gigabytes",
    ".venv/bin/pre-commit install": "would change the repository",
    "mkdir light": "the test of the page makes the folder in Python",
    "ln -s ": "the test of the page makes the links in Python",
    "rm light": "the test of the page makes the links in Python",
}


def name_of(page: Path) -> str:
    """A page by its path in the repository."""
    return str(page.relative_to(ROOT))


def lines(page: Path) -> Iterator[str]:
    """The logical lines of a page's blocks of bash, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip()


def unaccounted() -> list[tuple[str, str]]:
    """Lines of which nothing here says who runs them, or why nobody does."""
    return [(name_of(page), line) for page in PAGES for line in lines(page) if _who(name_of(page), line) is None]


def _who(page: str, line: str) -> str | None:
    reason = next((NOT_RUN[beginning] for beginning in NOT_RUN if line.startswith(beginning)), None)
    if page.startswith(RECORDED):
        return RECORDED
    if page in BY_OTHERS:
        ours = line.startswith(("emloc-tools ", "python train_lora.py "))
        return BY_OTHERS[page] if ours else reason
    if page in HERE and line.startswith(("emloc-tools ", *TRAINERS)):
        return "here"
    return reason
