"""Cuts: after sentences, else between words, and nothing is left out."""

import itertools

import numpy as np
import pytest
import tiny_passages
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.text import passage_cuts, wordpiece

TOKENIZER = tiny_passages.tokenizer()


def cut(text, **options):
    [pieces] = wordpiece.encode(TOKENIZER, [text])
    borders = passage_cuts.Borders.of(text, pieces)
    ranges = list(passage_cuts.cut(borders, **options))
    parts = [
        text[pieces.chars[start, 0] : pieces.chars[end - 1, 1]] for start, end in ranges
    ]
    return ranges, parts


def test_a_sentence_that_ends_in_the_last_third_ends_the_passage():
    text = "the river flows. The old river. The green field flows through the town"
    assert cut(text, length=9)[1] == [
        "the river flows. The old river.",  # 8 of 9 wordpieces
        "The green field flows through the town",
    ]
    # At 12, the sentences end before the last third: the words decide.
    assert cut(text, length=13)[1] == [
        "the river flows. The old river. The green field flows through",
        "the town",
    ]


def test_punctuation_stays_with_its_word_where_it_can():
    text = "river river river (river) river"
    assert cut(text, length=4)[1] == ["river river river", "(river) river"]
    # Without any space, the next best is between punctuation and word.
    assert cut("river,river,river", length=3)[1] == ["river,river", ",river"]


@given(
    st.lists(
        st.sampled_from(["the", "river", "zx.", "(old)", "中国", "Town!\n"]), min_size=1
    ),
    st.integers(4, 12),
    st.integers(0, 4),
)
def test_passages_cover_all_in_order_at_words(words, length, stride):
    text = " ".join(words)
    [pieces] = wordpiece.encode(TOKENIZER, [text])
    ranges, _ = cut(text, length=length, stride=stride)
    starts = np.flatnonzero(np.diff(pieces.words, prepend=-1))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(pieces.ids)
    for start, end in ranges:
        assert 0 < end - start <= length
        assert start in starts
        assert end in [*starts, len(pieces.ids)]
    for (first, end), (second, _) in itertools.pairwise(ranges):
        assert first < second <= end
        if stride:
            assert second - first <= max(stride, 2)  # no word is longer than 2
        else:
            assert second == end


def test_a_word_that_does_not_fit_is_named_by_its_size():
    with pytest.raises(passage_cuts.WordTooLongError) as error:
        cut("the zxyzxy", length=5)
    assert error.value.args == (6,)
    assert len(cut("the zxyzxy", length=6)[0]) == 2


def test_only_borders_that_agree_are_cut_at():
    text = "the river flows through the old town the river flows"
    asked = []

    def agrees(start, end):
        asked.append((start, end))
        return start != 5

    ranges, _ = cut(text, length=5, agrees=agrees)
    assert ranges == [(0, 4), (4, 9), (9, 10)]
    assert (0, 5) in asked
    with pytest.raises(LookupError):
        cut(text, length=5, agrees=lambda start, end: start == 0)
