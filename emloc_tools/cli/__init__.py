"""The command line: thin commands over `stages`. Importing it loads neither torch nor transformers."""

from emloc_tools.cli.group import main

__all__ = ["main"]
