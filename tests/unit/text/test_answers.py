"""One rule of what an answer is: scored, searched for and read alike."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.text import answers
from realm_retro.text.answers import (
    AnswerIndex,
    answer_spans,
    exact_match,
    f1,
    has_answer,
    is_correct,
    regex_match,
    token_spans,
    token_text,
)
from realm_retro.text.words import normalise, words_of


def found(text, *expected, is_regex=False):
    """The texts of the spans, which are bytes."""
    spans = answer_spans(text, expected, is_regex)
    assert has_answer(text, expected, is_regex) == bool(spans)
    return [text.encode()[start:end].decode() for start, end in spans]


# Scores of predictions


def test_exact_match_takes_any_answer():
    assert exact_match("the Beatles", ["Stones", "Beatles."])
    assert not exact_match("Beatles band", ["Beatles"])
    assert exact_match("Röntgen", ["Ro\u0308ntgen"])
    assert not exact_match("Rontgen", ["Röntgen"])
    assert not exact_match("x", [])


def test_f1_is_the_best_over_answers():
    assert f1("the cat sat", ["a cat sat down"]) == pytest.approx(2 * 2 / (2 + 3))
    assert f1("cat cat", ["cat"]) == pytest.approx(2 * 1 / 3)
    assert f1("cat", ["dog", "cat"]) == 1
    assert f1("cat", ["dog"]) == f1("", ["dog"]) == f1("cat", ["the"]) == 0
    assert f1("the", ["a"]) == 1
    assert f1("cat", []) == 0


def test_regex_match_is_anchored_at_the_start_only():
    assert regex_match("september 1988", ["Sept?(ember)?"])
    assert not regex_match("in September", ["Sept?(ember)?"])
    assert regex_match("Long Island, NY", ["Queens", r"long\s?island"])
    assert is_correct("SEPT", ["sept"], is_regex=True)
    assert is_correct("the sept", ["Sept."], is_regex=False)
    assert not is_correct("the sept", ["sept"], is_regex=True)


# Plain answers in texts


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("He met the Beatles, twice.", "beatles", ["Beatles"]),
        ("beatlesque beatles' Beatles", "Beatles", ["beatles", "Beatles"]),
        ("who is The Who? the who.", "The Who", ["The Who", "the who"]),
        ("a U.S. citizen told us", "US", ["U.S", "us"]),
        ("May 18 2018 (May 18, 2018)", "may 18, 2018", ["May 18 2018", "May 18, 2018"]),
        ("581 (second edition).", "581 ( second edition )", ["581 (second edition"]),
        ("Paris-based, Neo-Paris", "Paris", ["Paris", "Paris"]),
        ("Lincoln's hat", "Lincoln", ["Lincoln"]),
        ("the 1988–89 season", "1988", ["1988"]),
        ("the 1988–89 season", "1988–89", ["1988–89"]),
        ("10,000 or 3.5 or 10", "10", ["10"]),
        ("7,056 and 7056", "7056", ["7,056", "7056"]),
        ("£5 or 5", "£5", ["£5"]),
        ("£5 or $5", "5", ["5", "5"]),
        ("a jay-z song by jayz", "Jay-Z", ["jay-z", "jayz"]),
        ("http://x.org/new york/new", "New York", ["new york"]),
        ("Wilhelm Röntgen", "wilhelm ro\u0308ntgen", ["Wilhelm Röntgen"]),
        ("Wilhelm Rontgen", "Röntgen", []),
        ("Tokyo (東京都) は", "東京", ["東京"]),
        ("在歐洲，梵語", "歐洲", ["歐洲"]),
        ("在歐 洲", "歐洲", []),
        ("ภาษาไทยง่าย", "ไทย", ["ไทย"]),
        ("he saw a man", "A", []),
        ("what?!", "?", []),
        ("", "x", []),
        ("🚁 flies", "🚁", ["🚁"]),
        ("x_y", "y", ["y"]),
        ("new\nyork", "New York", ["new\nyork"]),
    ],
)
def test_spans_of_plain_answers(text, answer, expected):
    assert found(text, answer) == expected


def test_all_answers_are_found_and_none_twice():
    text = "New York City is in New York"
    assert found(text, "New York", "new york", "New York City", "City") == [
        "New York",
        "New York City",
        "City",
        "New York",
    ]


def test_spans_are_bytes():
    assert answer_spans("é é Ω end", ["Ω"], False) == [(6, 8)]


TEXTS = st.lists(
    st.sampled_from([*"USa.,-–é歐洲£( \n", "us", "the", "10", "000", "'s", "  "]),
    max_size=14,
).map("".join)


@given(TEXTS, TEXTS)
def test_every_span_is_an_exact_match_between_word_borders(text, answer):
    for span in found(text, answer):
        assert exact_match(span, [answer])
        assert span == span.strip()
        assert span[0] not in ".-,('"
        assert span[-1] not in ".-,('"


@given(TEXTS, TEXTS)
def test_every_run_of_pieces_with_the_answers_words_is_found(text, answer):
    """Against all pairs of borders; articles count as words here."""
    if not normalise(answer):
        return
    pieces = [p for word in words_of(text) for p in word.pieces]
    words = [w.form for w in words_of(answer)]
    expected = set()
    for i, j in itertools.combinations_with_replacement(range(len(pieces)), 2):
        span = text[pieces[i].start : pieces[j].end]
        same = [w.form for w in words_of(span)] == words
        if same and exact_match(span, [answer]):
            expected.add((pieces[i].start, pieces[j].end))
    found = {(s, e) for _, s, e in AnswerIndex.build([[answer]]).find(text)}
    assert found == expected


def test_an_index_of_many_questions():
    index = AnswerIndex.build([["Rome", "A"], ["Paris", "Rome!"], ["?", "the", "Nice"]])
    hits = list(index.find("Rome, not Paris"))
    assert sorted(hits) == [(0, 0, 4), (1, 0, 4), (1, 10, 15)]
    assert index.unmatchable == {0: 1, 2: 2}


def test_a_word_of_a_million_pieces_takes_no_square_time():
    text = "a-b/" * 50_000
    hits = AnswerIndex.build([["b a b"], ["ba"]]).find(text)
    assert sum(1 for _ in hits) == 49_999


# Regular expressions in texts


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("in September 1988", "Sept?(ember)?", ["September"]),
        ("Woodstock, not Hollywood", "wood", ["Woodstock"]),
        ("New York, NewYork", r"New\s?York", ["New York", "NewYork"]),
        ("cost $5 million", r"\$5 million", ["$5 million"]),
        ("run of 26 miles.", r"\s*26\s*miles", ["26 miles"]),
        ("4 of 14, 4.5 and 44", r"\b4\b|four", ["4", "4.5"]),
        ("nothing here", "x*", []),
        ("nothing here", "zebra", []),
        ("bei 5778 °C", r"5,?778\s°C", ["5778 °C"]),
        ("first\nlast", "^last$", ["last"]),
    ],
)
def test_spans_of_regular_expressions(text, pattern, expected):
    assert found(text, pattern, is_regex=True) == expected


def test_a_match_that_is_refused_hides_none_behind_it():
    # "ood and oodles" begins inside a word.
    assert found("hood and oodles", "ood.*s|oodles", is_regex=True) == ["oodles"]


def test_a_long_match_is_cut_to_what_the_expression_needs():
    text = "one two three four five six Eureka seven eight nine ten eleven twelve"
    assert found(text, ".*Eureka.*", is_regex=True) == ["Eureka"]
    assert found(text, "two.*twelve", is_regex=True) == [text[4:]]
    assert found("it was Eureka there", ".*Eureka.*", is_regex=True) == [
        "it was Eureka there"
    ]


PATTERNS = ["us?", "(10)+", r"\bs\b", "u.*0", "é|a", r"\s*the", "[^a]u", "歐"]


@given(TEXTS, st.sampled_from(PATTERNS))
def test_every_span_of_an_expression_scores(text, pattern):
    spans = found(text, pattern, is_regex=True)
    assert all(regex_match(span, [pattern]) for span in spans)


# Tokens


def test_spans_of_tokens():
    #       In  19  ##88  ,  é(2 bytes)  end
    tokens = np.array([[0, 2], [3, 5], [5, 7], [7, 8], [9, 11], [12, 15]])
    spans = [(3, 7), (9, 11), (4, 6), (7, 9), (2, 3), (14, 30)]
    found = token_spans(tokens, spans)
    assert found.dtype == np.int32
    # (3, 7) and (4, 6) are the same two tokens; (2, 3) is the space between tokens.
    assert found.tolist() == [[1, 3], [3, 4], [4, 5], [5, 6]]
    assert token_spans(tokens, []).shape == (0, 2)
    assert token_spans(tokens[:0], spans).shape == (0, 2)


def test_the_text_of_tokens_is_as_it_was_written():
    text = "In Zürich, Été"
    tokens = np.array([[0, 2], [3, 7], [7, 10], [10, 11], [12, 17]])
    assert token_text(text, tokens, 1, 3) == "Zürich"
    assert token_text(text, tokens, 1, 5) == "Zürich, Été"


def test_an_expression_that_does_not_compile():
    for pattern in ["(", "a{99999999999}", "["]:
        with pytest.raises(ValueError, match=r"\S"):
            answers.compile_regex(pattern)
    assert answers.compile_regex("[[a]")  # Python warns that it may change
