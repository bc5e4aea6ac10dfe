"""The page on what can be called from Python, docs/api.md, from signatures and docstrings."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emloc_tools import errors, linalg
from emloc_tools.cli import main as group

PAGE = Path(__file__).parent / "api.md"
INTRODUCTION = """# Python API

Written by `make docs` from signatures and docstrings. [In Python](python.md) shows how they go together.

Every command is a function of `emloc_tools.stages` with the same options as keyword arguments. It takes paths, returns
a small record and prints nothing. `progress` is called with an `emloc_tools.records.Step` after each unit of work;
`command` is what is recorded as the command line that made a folder.
"""


def page() -> str:
    """The text of the page."""
    sections = [INTRODUCTION, "## Emulators and recorded inputs\n"]
    for name in ("load_emulator", "record_inputs"):
        sections += _function(getattr(importlib.import_module("emloc_tools"), name), f"emloc_tools.{name}")
    sections.append("## Stages\n")
    for command in group.commands:
        name = command.replace("-", "_")
        sections += _stage(getattr(importlib.import_module(f"emloc_tools.stages.{name}"), name), name)
    sections.append("## Errors\n")
    sections += [
        f"- `{name}`: {_prose(kind)}" for name, kind in vars(errors).items() if inspect.isclass(kind) and kind.__doc__
    ]
    sections.append("\n## Mathematics\n\nTensors in, tensors out; see [mathematics](mathematics.md) for the symbols.\n")
    for name, function in _public(linalg):
        sections += _function(function, name)
    return "\n".join(sections).rstrip() + "\n"


def _stage(function: Any, name: str) -> Iterator[str]:
    """A stage, and the record that it returns, or a list of them."""
    yield from _function(function, f"emloc_tools.stages.{name}.{name}")
    returned = typing.get_type_hints(function)["return"]
    for record in (returned, *typing.get_args(returned)):
        if dataclasses.is_dataclass(record):
            yield f"**`{getattr(record, '__name__', '')}`** {', '.join(_fields(record))}\n\n{_doc(record)}\n"


def _fields(record: Any) -> Iterator[str]:
    yield from (f"`{field.name}: {field.type}`" for field in dataclasses.fields(record))
    yield from (f"`{name}`" for name, value in vars(record).items() if isinstance(value, property))


def _function(function: Any, name: str) -> Iterator[str]:
    """A heading, the signature with a parameter in each line, and the docstring."""
    signature = inspect.signature(function)
    lines = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        lines.append(f"    {_parameter(parameter)},")
    text = "\n".join([f"{name}(", *lines, f") -> {signature.return_annotation}"])
    yield f"### {function.__name__}\n\n```python\n{text}\n```\n\n{_doc(function)}\n"


def _parameter(parameter: inspect.Parameter) -> str:
    kinds: dict[object, str] = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}
    stars = kinds.get(parameter.kind, "")
    text = f"{stars}{parameter.name}: {parameter.annotation}"
    if parameter.default is parameter.empty:
        return text
    # A function has no literal, but a name.
    return f"{text} = {getattr(parameter.default, '__name__', None) or repr(parameter.default)}"


def _public(package: Any) -> Iterator[tuple[str, Any]]:
    """The public functions of a package's modules, in the order of the files."""
    for path in sorted(Path(package.__path__[0]).glob("[a-z]*.py")):
        module = importlib.import_module(f"{package.__name__}.{path.stem}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                yield f"{module.__name__}.{name}", value


def _doc(documented: Any) -> str:
    """A docstring as Markdown: its paragraphs and lists are Markdown already."""
    return inspect.cleandoc(documented.__doc__ or "")


def _prose(documented: Any) -> str:
    """A docstring as an entry of a list."""
    return textwrap.indent(_doc(documented), "  ").strip()
