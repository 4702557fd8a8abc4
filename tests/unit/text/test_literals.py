"""The filter of regular expressions leaves out none that matches."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.text.answers import compile_regex
from realm_retro.text.literals import PatternFilter, fold, required_literals


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("Saudi Arabia", {"saudi arabia"}),
        ("Sept?(ember)?|Feb(ruary)?", {"sep", "feb"}),
        (
            r"Long Island|New\s?York|Roosevelt Field",
            {"long island", "york", "roosevelt field"},
        ),
        ("189[6789]", {"189"}),
        (r"\b134\b|56\.7", {"134", "56.7"}),
        ("(abc)+d", {"abc"}),
        ("(abc)*d", {"d"}),
        ("abcd?", {"abc"}),
        ("x(?:foo|barbar)y", {"foo", "barbar"}),
        ("x(?:foo|[0-9])y", {"y"}),
        ("(?=look)ahead", {"ahead"}),
        ("[0-9]+", None),
        (".*", None),
        ("naïve", {"ve"}),
        ("a|", None),
        ("(?>atom)ic", {"atom"}),
        ("(?P<x>ab)(?P=x)c", {"ab"}),
    ],
)
def test_required_literals(pattern, expected):
    found = required_literals(compile_regex(pattern))
    assert found == (None if expected is None else frozenset(expected))


PIECES = [
    "ab",
    "A",
    "b",
    "c.",
    "[ab]",
    "(ab|c)",
    "(?:a|bc)?",
    r"\b",
    r"\s",
    "k",
    "s",
    "i",
]
PATTERNS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
TEXTS = st.text(alphabet="aAbBc .kKsſiİı\u212a", max_size=30)


@given(st.lists(PATTERNS, min_size=1, max_size=5), TEXTS)
def test_no_expression_that_matches_is_left_out(patterns, text):
    compiled = [compile_regex(pattern) for pattern in patterns]
    found = PatternFilter.build(compiled).candidates(text)
    assert found >= {i for i, p in enumerate(compiled) if p.search(text)}


def test_the_filter_leaves_out_what_cannot_match():
    patterns = ["Long Island", "london|paris", r"\b4\b", "[0-9]+", "paris.*rome"]
    filtered = PatternFilter.build(compile_regex(pattern) for pattern in patterns)
    assert filtered.unfiltered == [3]
    assert filtered.candidates("a long is land") == {3}
    assert filtered.candidates("LONG ISLAND 4") == {0, 2, 3}
    # "rome" and "paris" are both needed; one of them is looked for.
    assert filtered.candidates("Paris") >= {1, 3}
    assert filtered.candidates("") == {3}


def test_fold_keeps_what_ignoring_case_takes_for_equal():
    for letter in "iks":
        others = [chr(c) for c in range(0x3000) if re.match(letter, chr(c), re.I)]
        assert {fold(other)[0] for other in others} == {letter}
