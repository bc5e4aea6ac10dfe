"""Whether one of PEFT's `rank_pattern` or `alpha_pattern` keys means a module, decided in bounded time.

PEFT asks `re.match(rf"(.*\\.)?({pattern})$", module)`, and `re` backtracks: a key such as `(a+)+b` hangs whoever asks.
Here the same parsed expression is followed for all positions of the name at once. Look-around, back-references and
the like cannot be followed that way and are refused; no such pattern is needed to name modules.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from typing import Any

# The parser of `re`: its tree has kept its form since Python 2, only the module was renamed.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

LONGEST_PATTERN = 1000  # characters, of a pattern and of a name
MOST_STEPS = 20_000  # for one pattern and one name; usual ones take a few dozen
ANCHORS = ("AT_BEGINNING", "AT_BEGINNING_STRING", "AT_END", "AT_END_STRING")
HARMLESS = re.compile(r"[^*+?{|(]*")  # repeats nothing and has no alternatives: `re` itself is fast enough


class ModulePattern:
    """One key of `rank_pattern` or `alpha_pattern`. Raises `ValueError` if it is invalid or cannot be followed."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LONGEST_PATTERN:
            raise ValueError(f"is longer than {LONGEST_PATTERN} characters")
        self.text = pattern
        whole = rf"(.*\.)?({pattern})$"
        try:
            self._tree = _parser.parse(whole)
            _require_followable(self._tree)
            self._compiled = re.compile(whole) if HARMLESS.fullmatch(pattern) else None
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is not a usable regular expression: {error}") from error

    def matches(self, module: str) -> bool:
        """Whether PEFT would apply the key to `module`. Raises `ValueError` if that takes too long to find out."""
        if len(module) > LONGEST_PATTERN:
            raise ValueError(f"cannot be matched with a name of {len(module)} characters")
        if self._compiled is not None:
            return self._compiled.match(module) is not None
        return _Follower(module).follow(self._tree, 1) != 0


def _require_followable(nodes: Any) -> None:
    """Refuse what `_Follower` does not know, wherever it stands."""
    for op, argument in nodes:
        match str(op):
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                continue
            case "AT" if str(argument) in ANCHORS:
                continue
            case "SUBPATTERN" if not argument[1] and not argument[2]:  # no flags
                _require_followable(argument[3])
            case "BRANCH":
                for branch in argument[1]:
                    _require_followable(branch)
            case "MAX_REPEAT" | "MIN_REPEAT":
                _require_followable(argument[2])
            case _:
                raise ValueError("uses look-around, a back-reference or another thing that no module name needs")


class _Follower:
    """Sets of positions in a name are the bits of an integer: bit i stands before character i."""

    def __init__(self, name: str) -> None:
        self._name, self._steps = name, 0
        self._fitting: dict[int, int] = {}

    def follow(self, nodes: Iterable[tuple[Any, Any]], positions: int) -> int:
        """Where a sequence of nodes may end when it starts at one of `positions`."""
        for node in nodes:
            self._steps += 1
            if self._steps > MOST_STEPS:
                raise ValueError(f"takes too long to match with {self._name}")
            positions = self._node(node, positions)
            if not positions:
                break
        return positions

    def _node(self, node: tuple[Any, Any], positions: int) -> int:
        op, argument = str(node[0]), node[1]
        match op:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                if id(node) not in self._fitting:
                    fitting = sum(1 << i for i, c in enumerate(self._name) if _is(c, op, argument))
                    self._fitting[id(node)] = fitting
                return (positions & self._fitting[id(node)]) << 1
            case "SUBPATTERN":
                return self.follow(argument[3], positions)
            case "BRANCH":
                ends = 0
                for branch in argument[1]:
                    ends |= self.follow(branch, positions)
                return ends
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, body = argument
                return self._repeat(int(least), int(most), body, positions)
        # An anchor. PEFT's `$` also stands before a last line break; names with one are no modules of ours.
        return positions & (1 if "BEGINNING" in str(argument) else 1 << len(self._name))

    def _repeat(self, least: int, most: int, body: Any, positions: int) -> int:
        for _ in range(least):
            after = self.follow(body, positions)
            if after == positions:  # then every further round gives the same, too
                break
            positions = after
        reached = frontier = positions
        for _ in range(most - least):
            frontier = self.follow(body, frontier) & ~reached
            if not frontier:
                break
            reached |= frontier
        return reached


def _is(c: str, op: str, argument: Any) -> bool:
    """Whether a character fits a node that takes one character."""
    match op:
        case "LITERAL":
            return bool(ord(c) == argument)
        case "NOT_LITERAL":
            return bool(ord(c) != argument)
        case "ANY":
            return c != "\n"
        case "RANGE":
            return bool(argument[0] <= ord(c) <= argument[1])
        case "CATEGORY":
            kind = str(argument).removeprefix("CATEGORY_")
            member = {"DIGIT": c.isdecimal(), "SPACE": c.isspace(), "WORD": c.isalnum() or c == "_"}
            return member[kind.removeprefix("NOT_")] != kind.startswith("NOT_")
    negated = str(argument[0][0]) == "NEGATE"
    return any(_is(c, str(part), value) for part, value in argument[negated:]) != negated
