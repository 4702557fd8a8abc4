"""Masks: one span of an example, whole words, never a part of what was asked for."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.text import masking

SPANS = np.array([[0, 2], [3, 4], [5, 15], [8, 19], [18, 20]], np.int32)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_one_span_is_masked_and_each_is_as_likely():
    chosen = collections.Counter()
    for seed in range(600):
        found = masking.mask_salient(19, SPANS, rng(seed), 10)
        assert found.dtype == np.int32
        chosen[tuple(found.tolist())] += 1
    # [8, 19) is longer than ten pieces, [18, 20) goes beyond the query.
    assert set(chosen) == {(0, 1), (3,), tuple(range(5, 15))}
    assert min(chosen.values()) > 150


def test_no_span_no_mask():
    for spans in (np.zeros((0, 2), int), [], [[4, 9]], [[-1, 2]], [[2, 2]]):
        found = masking.mask_salient(8, np.asarray(spans, int), rng(), 10)
        assert found.shape == (0,)
        assert found.dtype == np.int32


def test_the_longest_that_fits_is_usable():
    spans = np.array([[0, 3], [0, 4]])
    assert masking.usable_spans(10, spans, 3).tolist() == [[0, 3]]
    assert masking.usable_spans(4, spans, 9).tolist() == [[0, 3], [0, 4]]


@st.composite
def word_lists(draw):
    widths = draw(st.lists(st.integers(1, 6), max_size=20))
    ends = np.cumsum(widths, dtype=int)
    return np.stack([ends - widths, ends], axis=1).reshape(-1, 2)


@given(word_lists(), st.integers(0, 99), st.integers(1, 8))
def test_random_spans_are_whole_words(words, seed, max_masks):
    found, lost = masking.mask_random_span(words, rng(seed), max_masks)
    assert len(found) <= max_masks
    if not len(found):
        assert all(end - start > max_masks for start, end in words)
        # Whatever was to be masked is lost.
        assert (lost > 0) == (len(words) > 0)
        return
    # With room for all words nothing is lost, and it is the same run but for its end.
    longer, nothing = masking.mask_random_span(words, rng(seed), 10_000)
    assert nothing == 0
    if (words[:, 1] - words[:, 0] <= max_masks).all():
        assert len(longer) == len(found) + lost
        assert longer[0] == found[0]
    assert found.tolist() == list(range(found[0], found[-1] + 1))
    assert found[0] in words[:, 0]
    assert found[-1] + 1 in words[:, 1]


def test_random_spans_have_spanberts_lengths_and_start_anywhere():
    words = np.stack([np.arange(400), np.arange(1, 401)], axis=1)
    drawn = [masking.mask_random_span(words, rng(seed), 10) for seed in range(3000)]
    found, lost = zip(*drawn, strict=True)
    # Beyond the tenth of words that are as likely to be the last: 0.8^10 / 0.2.
    np.testing.assert_allclose(np.mean(lost), 0.8**10 / 0.2, rtol=0.25)
    lengths = np.bincount([len(f) for f in found], minlength=11)[1:] / len(found)
    geometric = 0.2 * 0.8 ** np.arange(10)
    geometric[-1] += 0.8**10  # cut at ten
    np.testing.assert_allclose(lengths, geometric, atol=0.03)
    assert np.std([f[0] for f in found]) > 100


@given(st.integers(0, 100), st.integers(0, 99), st.integers(1, 12))
def test_random_tokens(length, seed, max_masks):
    found, lost = masking.mask_random_tokens(length, rng(seed), max_masks)
    wanted = min(max(1, round(0.15 * length)), length)
    assert len(found) == min(wanted, max_masks)
    assert lost == wanted - len(found)
    assert found.dtype == np.int32
    assert (np.diff(found) > 0).all()
    assert all(0 <= position < length for position in found)


@pytest.mark.parametrize("function", ["salient", "span", "tokens"])
def test_the_seed_decides(function):
    words = np.stack([np.arange(50), np.arange(1, 51)], axis=1)
    masked = {
        "salient": lambda r: masking.mask_salient(50, words, r, 10),
        "span": lambda r: masking.mask_random_span(words, r, 10)[0],
        "tokens": lambda r: masking.mask_random_tokens(50, r, 10)[0],
    }[function]
    assert masked(rng(3)).tolist() == masked(rng(3)).tolist()
    assert len({tuple(masked(rng(seed)).tolist()) for seed in range(20)}) > 5


def test_words_of_ids():
    continuations = np.array([False, False, True])
    assert masking.word_spans(np.array([1, 2, 2, 1, 0, 2]), continuations).tolist() == [
        [0, 3],
        [3, 4],
        [4, 6],
    ]
    # A query may begin within a word.
    assert masking.word_spans(np.array([2, 1]), continuations).tolist() == [
        [0, 1],
        [1, 2],
    ]
    assert masking.word_spans(np.zeros(0, int), continuations).shape == (0, 2)


def test_spans_of_a_passage_in_a_query_of_it():
    inside, cut = masking.spans_within(SPANS, 3, 15)
    assert inside.tolist() == [[0, 1], [2, 12]]
    assert cut == 1
    inside, cut = masking.spans_within(np.zeros((0, 2), int), 3, 15)
    assert inside.shape == (0, 2)
    assert cut == 0
