"""Write what is generated in the documentation: commands, the API, recorded results, and the pages on trainers.

    python -m docs.generate

`benchmarks/results/NAME.md`, without its heading, goes between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. A
test fails while a page differs from what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from docs import api_page, trainer_pages
from emloc_tools.cli import main as group

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
WITH_RESULTS = (
    DOCS.parent / "README.md",
    DOCS / "benchmarks.md",
    DOCS / "transfer.md",
    DOCS / "heads.md",
    DOCS / "plan.md",
    DOCS / "diffusion.md",
    DOCS / "trainers" / "four-bits.md",
)
WIDTH = 100
INTRODUCTION = """# Command reference

Written by `make docs` from the commands themselves. `emloc-tools COMMAND --help` shows the same.

- A base (`--base`) is a local model folder or a Hub id (`org/name`, `org/name/subfolder`, with `--revision` if need
  be). Weights are read only from safetensors. `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are honoured.
- An output is a folder, but for the files of `trainer-config`, `report` and `plan --save`. It appears under its name
  only when it is complete. An existing one is refused unless `--overwrite` is given. That replaces a folder that
  emloc-tools wrote, but not one that also holds a file or sub-folder of a name that emloc-tools does not write there.
- Results go to stdout, progress, warnings and errors to stderr. `--json` prints one JSON object, of which every command
  has [a schema](../formats/json/README.md); `--quiet` prints errors only.
- Exit status: 0 done, 1 an error with one line that says what to do, 2 wrong usage, 130 interrupted, 143
  terminated.
- Sizes take units of base 10 (`GB`) and base 2 (`GiB`); counts of parameters take `K`, `M`, `B` and `T`.
- Colours are shown on a terminal alone, and not where the environment variable `NO_COLOR` is set.
- Shells complete commands, options and choices after one line in their start-up file. bash, in `~/.bashrc`:
  `eval "$(_EMLOC_TOOLS_COMPLETE=bash_source emloc-tools)"`; zsh, in `~/.zshrc`:
  `eval "$(_EMLOC_TOOLS_COMPLETE=zsh_source emloc-tools)"`; fish, in `~/.config/fish/completions/emloc-tools.fish`:
  `_EMLOC_TOOLS_COMPLETE=fish_source emloc-tools | source`.
"""


def pages() -> dict[Path, str]:
    """The full text of every page that holds something generated."""
    results = {page: with_results(page) for page in WITH_RESULTS}
    return {DOCS / "cli.md": reference(), api_page.PAGE: api_page.page(), **results, **trainer_pages.pages()}


def reference() -> str:
    """The command reference: every command as `--help` shows it."""
    sections = [INTRODUCTION]
    for name, command in group.commands.items():
        context = click.Context(command, info_name=f"emloc-tools {name}", terminal_width=WIDTH)
        sections.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)


def with_results(page: Path) -> str:
    """A page with the current results between its marks."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
        body = re.sub(r"\A# .*\n+", "", text).strip()
        return f"<!-- {name}: begin -->\n\n{body}\n\n<!-- {name}: end -->"

    marked = r"<!-- ([\w-]+): begin -->.*?<!-- \1: end -->"
    return re.sub(marked, fill, page.read_text(encoding="utf-8"), flags=re.DOTALL)


def main() -> None:
    """Write the pages that are not current."""
    for page, text in pages().items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
