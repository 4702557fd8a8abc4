"""Merging the results of parts is searching the whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro.retrieval.index.base import SearchResult
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.merge import merge


@given(
    rows=st.integers(2, 40),
    k=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 39), max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_parts_give_the_whole(rows, k, cuts, seed):
    rng = np.random.default_rng(seed)
    # Small integers, so that ties are many.
    vectors = rng.integers(-2, 3, (rows, 2)).astype(np.float32)
    queries = rng.integers(-2, 3, (5, 2)).astype(np.float32)
    ids = np.sort(rng.choice(99, rows, replace=False))

    def search(part):
        index = ExactIndex.build(vectors[part], ids[part], metric="squared_l2")
        return index.search(queries, k)

    borders = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    parts = [search(slice(a, b)) for a, b in itertools.pairwise(borders)]
    rng.shuffle(parts)
    merged, whole = merge(parts, k), search(slice(None))
    np.testing.assert_array_equal(merged.ids, whole.ids)
    np.testing.assert_array_equal(merged.scores, whole.scores)


def test_missing_results_come_last_and_fill_up():
    part = SearchResult(np.array([[4, -1]]), np.array([[-9, -np.inf]], np.float32))
    other = SearchResult(np.array([[7]]), np.array([[-2]], np.float32))
    merged = merge([part, other], 4)
    np.testing.assert_array_equal(merged.ids, [[7, 4, -1, -1]])
    np.testing.assert_array_equal(merged.scores, [[-2, -9, -np.inf, -np.inf]])
    assert merged.ids.dtype == np.int64
    assert merged.scores.dtype == np.float32


def test_parts_must_answer_the_same_queries():
    with pytest.raises(ValueError, match="queries do not merge"):
        merge([SearchResult.missing(1, 2), SearchResult.missing(2, 2)], 2)
    with pytest.raises(ValueError, match="at least one"):
        merge([], 2)
