"""The site has every page, once, and links to headings lead to headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.test_docs import PAGES, ROOT

LINK = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")


def in_navigation(entry: Any) -> list[str]:
    """The pages that an entry of the navigation names, whatever they are under."""
    if isinstance(entry, str):
        return [entry]
    values = entry if isinstance(entry, list) else entry.values()
    return [page for value in values for page in in_navigation(value)]


def without_code(text: str) -> str:
    """A page's text outside of blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """The addresses of a page's headings, as GitHub and MkDocs make them where both agree."""
    found = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in found}


def test_the_navigation_has_every_page_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["strict"]
    assert sorted(in_navigation(settings["nav"])) == sorted(str(page.relative_to(ROOT)) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_headings_lead_to_headings(page: Path) -> None:
    links = LINK.findall(without_code(page.read_text(encoding="utf-8")))
    inside = [(file, anchor) for file, anchor in links if "://" not in file]
    assert [link for link in inside if link[1] not in headings((page.parent / link[0]) if link[0] else page)] == []


def test_a_heading_that_is_not_there_is_found(tmp_path: Path) -> None:
    """The control."""
    page = tmp_path / "page.md"
    page.write_text("# One, two\n\n```bash\n# no heading\n```\n[a](#one-two) [b](#no-heading)\n")
    assert headings(page) == {"one-two"}
    with pytest.raises(AssertionError, match="no-heading"):
        test_links_to_headings_lead_to_headings(page)
