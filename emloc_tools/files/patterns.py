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
from functools import lru_cache
from typing import Any

# The parser of `re`: its tree has kept its form since Python 2, only the module was renamed.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

LONGEST_PATTERN = 1000  # characters
MOST_STEPS = 20_000  # for one pattern and one name; usual ones take a few dozen
HARMLESS = re.compile(r"[^*+?{|(]*")  # repeats nothing and has no alternatives: `re` itself is fast enough


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether PEFT's `pattern` matches `module`. Raises `ValueError` for one that is invalid or cannot be followed."""
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it is longer than {LONGEST_PATTERN} characters")
    try:
        if HARMLESS.fullmatch(pattern):
            return re.match(_whole(pattern), module) is not None
        return _Follower(module).follow(_parse(pattern), 1) != 0
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is not a usable regular expression: {error}") from error


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


@lru_cache(maxsize=1024)
def _parse(pattern: str) -> Any:
    return _parser.parse(_whole(pattern))


class _Follower:
    """Sets of positions in a name are the bits of an integer: bit i stands before character i."""

    def __init__(self, name: str) -> None:
        self._name, self._steps = name, 0

    def follow(self, nodes: Iterable[tuple[Any, Any]], positions: int) -> int:
        """Where a sequence of nodes may end when it starts at one of `positions`."""
        for op, argument in nodes:
            self._steps += 1
            if self._steps > MOST_STEPS:
                raise ValueError("it takes too long to match")
            positions = self._node(str(op), argument, positions)
            if not positions:
                break
        return positions

    def _node(self, op: str, argument: Any, positions: int) -> int:
        match op:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return sum(1 << i + 1 for i, c in enumerate(self._name) if positions >> i & 1 and _is(c, op, argument))
            case "SUBPATTERN" if not argument[1] and not argument[2]:  # no flags
                return self.follow(argument[3], positions)
            case "BRANCH":
                ends = 0
                for branch in argument[1]:
                    ends |= self.follow(branch, positions)
                return ends
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, body = argument
                return self._repeat(int(least), int(most), body, positions)
            case "AT" if str(argument) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
                return positions & 1
            case "AT" if str(argument) == "AT_END":
                before_break = 1 << len(self._name) - 1 if self._name.endswith("\n") else 0
                return positions & (1 << len(self._name) | before_break)
            case "AT" if str(argument) == "AT_END_STRING":
                return positions & 1 << len(self._name)
        raise ValueError(f"it uses {op}, which is not followed here")

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
