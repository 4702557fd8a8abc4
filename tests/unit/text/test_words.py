"""What counts of words, and where their pieces stand."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.text.words import normalise, words_of

TEXTS = st.lists(
    st.sampled_from([*"USa.,-–é歐洲£( \n\u0301", "us", "the", "10", "000", "'s", "  "]),
    max_size=14,
).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("a man, an apple & the end", "man apple end"),
        ("U.S.A.", "usa"),
        ("Theatre an-atomy", "theatre anatomy"),
        ("Röntgen", "ro\u0308ntgen"),
        ("7,056.5", "70565"),
        ("1988–89", "1988–89"),  # only ASCII punctuation goes
        ("A", ""),
        ("\u00a0 the\tİ", "i\u0307"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def pieces(text):
    """Each word's pieces as they are written."""
    return [[text[p.start : p.end] for p in word.pieces] for word in words_of(text)]


@pytest.mark.parametrize(
    ("text", "forms", "written"),
    [
        ("The cat, (sat).", ["the", "cat", "sat"], [["The"], ["cat"], ["sat"]]),
        ("U.S. Jay-Z", ["us", "jayz"], [["U", "S"], ["Jay", "Z"]]),
        ("1988–89", ["1988–89"], [["1988", "–", "89"]]),
        ("10,000.5 m2", ["100005", "m2"], [["10,000.5"], ["m2"]]),
        ("a.5 5.a 1,b", ["a5", "5a", "1b"], [["a", "5"], ["5", "a"], ["1", "b"]]),
        ("£5 $5", ["£5", "5"], [["£", "5"], ["5"]]),
        (
            "Été E\u0301te\u0301",
            ["e\u0301te\u0301"] * 2,
            [["Été"], ["E\u0301te\u0301"]],
        ),
        ("歐洲 NBA球", ["歐", "洲", "nba", "球"], [["歐"], ["洲"], ["NBA"], ["球"]]),
        ("?! … _", ["…"], [["…"]]),
        ("", [], []),
    ],
)
def test_words(text, forms, written):
    assert [word.form for word in words_of(text)] == forms
    assert pieces(text) == written


@given(TEXTS)
def test_composed_and_decomposed_texts_have_the_same_words(text):
    forms = [
        [word.form for word in words_of(unicodedata.normalize(form, text))]
        for form in ("NFC", "NFD")
    ]
    assert forms[0] == forms[1]


@given(TEXTS)
def test_words_leave_out_nothing_but_punctuation_and_space(text):
    left = list(text)
    for word in words_of(text):
        assert word.form == "".join(p.form for p in word.pieces)
        for piece in word.pieces:
            assert piece.form
            left[piece.start : piece.end] = " " * (piece.end - piece.start)
    assert not re.sub(r"[\s.,'()-]", "", "".join(left))
