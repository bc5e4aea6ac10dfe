"""PEFT's patterns are understood as PEFT understands them, and no pattern hangs."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc_tools.files import patterns
from emloc_tools.files.patterns import HARMLESS, ModulePattern

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.12.mlp.up_proj",
    "q_proj",
    "h.3.attn.c_attn",
    "score",
    "x.q-proj",
]
USUAL = [
    "q_proj",
    "self_attn.q_proj",
    "^model.layers.0.self_attn.q_proj",
    "model.layers.0",
    "[qkv]_proj",
    r"layers\.\d+\.mlp\..*_proj",
    r".*\.(q|v)_proj",
    r"layers\.(1[0-9]|2[0-3])\.mlp\.up_proj",
    r"(?:q|up)_proj",
    r"[^.]+",
    r"\w+_proj$",
    r"layers\.\d{1,2}\..*?proj",
    r".*\d.*",
    r"x\.\S+|score",
    r"(model)?.*attn",
    r"\Ascore\Z",
    r"[\w-]+",
    r"[^\d]*",
]


def peft_matches(pattern: str, module: str) -> bool:
    """What PEFT's `get_pattern_key` asks."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_mean_the_modules_that_peft_finds(pattern: str) -> None:
    assert [ModulePattern(pattern).matches(module) for module in MODULES] == [
        peft_matches(pattern, module) for module in MODULES
    ]


def test_the_usual_patterns_match_some_modules_and_not_others_and_take_both_ways() -> None:
    """Control: an answer that is always the same would pass the test above."""
    answers = {peft_matches(pattern, module) for pattern in USUAL for module in MODULES}
    assert answers == {True, False}
    assert {HARMLESS.fullmatch(pattern) is None for pattern in USUAL} == {True, False}


def test_it_agrees_with_what_peft_itself_calls() -> None:
    from peft.utils.other import get_pattern_key

    for module in MODULES:
        for pattern in set(USUAL) - {module}:  # an unmatched key is answered by the module's own name
            assert ModulePattern(pattern).matches(module) == (get_pattern_key([pattern], module) == pattern)


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: (
        st.builds(lambda x, y: x + y, inner, inner)
        | st.builds(lambda x, y: f"({x}|{y})", inner, inner)
        | st.builds(lambda x, q: f"(?:{x}){q}", inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,1}?"]))
    ),
    max_leaves=6,
)


@settings(derandomize=True, deadline=None)
@given(EXPRESSIONS, st.text("ab.", max_size=7))
def test_any_expression_agrees_with_python_on_any_short_name(pattern: str, module: str) -> None:
    assert ModulePattern(pattern).matches(module) == peft_matches(pattern, module)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a*)*b",
        "(.*)*b",
        "(a|aa)" * 100 + "b",
        "((((((a*)*)*)*)*)*)*b",
        "(a?){50}a{50}b",
        "a{100000}",
    ],
)
def test_patterns_that_backtrack_for_ever_are_decided_at_once(pattern: str) -> None:
    start = time.monotonic()
    assert not ModulePattern(pattern).matches("a" * 500)
    assert time.monotonic() - start < 2


def test_a_pattern_that_needs_too_many_steps_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, module = ModulePattern("(?:(a|b)*c?){3}x"), "abc" * 20 + "x"
    assert pattern.matches(module) is False  # four groups of c? cannot pass twenty c
    monkeypatch.setattr(patterns, "MOST_STEPS", 50)
    with pytest.raises(ValueError, match="takes too long"):
        pattern.matches(module)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "not a usable regular expression"),
        ("a)", "not a usable regular expression"),
        ("*a", "not a usable regular expression"),
        ("[b-a]", "not a usable regular expression"),
        ("a{2,1}", "not a usable regular expression"),
        (r"(a)\3", "back-reference"),
        ("a(?=b)", "look-around"),
        ("(?<!a)b", "look-around"),
        (r"\bq_proj\b", "another thing"),
        ("(?i:a)", "another thing"),
        ("a" * 1001, "longer than 1000 characters"),
        ("(" * 500 + ")" * 500, "not a usable regular expression"),
    ],
)
def test_what_cannot_be_followed_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModulePattern(pattern)


def test_a_name_beyond_any_module_s_length_is_refused() -> None:
    with pytest.raises(ValueError, match="name of 1001 characters"):
        ModulePattern("a").matches("a" * 1001)
