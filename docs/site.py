"""The documentation as a site: a hook of MkDocs that takes the pages from where they are in the repository.

    make site

README.md is the first page, `docs/` and `formats/` keep their places, and so every link that works in the repository
works on the site. Files that are no pages but are linked to, such as schemas, come along. Formulas become MathML while
the site is built, so that it loads nothing from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
FOLDER_LINK = re.compile(r"\[([^\]]*)\]\([^)#\s]*/\)")  # a listing on GitHub, and nothing on a site
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs: the files of the site, in place of those that it found in `docs_dir`."""
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files(
        [*of_theme, *(File.generated(config, name, abs_src_path=str(ROOT / name)) for name in sorted(names()))]
    )


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by MkDocs: the text of a page, without links to folders."""
    return FOLDER_LINK.sub(r"\1", markdown)


def on_page_content(content: str, **_: object) -> str:
    """Called by MkDocs: the HTML of a page, with formulas as MathML."""
    return FORMULA.sub(
        lambda match: convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline"), content
    )


def names() -> set[str]:
    """The paths in the repository of all pages, and of the files that these link to."""
    found = set(pages())
    for page in pages():
        for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            target = (ROOT / page).parent / link
            if "://" not in link and target.is_file():
                found.add(str(target.resolve().relative_to(ROOT)))
    return found


def pages() -> Iterator[str]:
    """The paths of all pages."""
    yield "README.md"
    for folder in ("docs", "formats"):
        for path in sorted((ROOT / folder).rglob("*.md")):
            if "golden" not in path.parts:
                yield str(path.relative_to(ROOT))
