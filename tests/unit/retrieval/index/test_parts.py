"""Parts together find what one index finds, and their recall is that of the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.retrieval.index import parts
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.parts import PartedIndex
from realm_retro.retrieval.index.tuning import Trial

K = 4


def normal(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)


def build(rows, ids=None):
    ids = np.arange(len(rows)) if ids is None else ids
    return ExactIndex.build(rows, ids, metric="squared_l2")


@given(st.integers(0, 60), st.integers(1, 70))
def test_rows_are_split_evenly_and_in_order(size, rows):
    ids = np.arange(size) * 3
    groups = parts.split(ids, rows)
    np.testing.assert_array_equal(np.concatenate(groups), ids)
    sizes = [len(group) for group in groups]
    assert max(sizes) <= rows
    assert max(sizes) - min(sizes) <= 1
    assert len(groups) == max(1, -(-size // rows))


def test_parts_find_what_one_index_finds_and_ties_go_to_the_smaller_id():
    vectors = normal(50)
    vectors[40] = vectors[3]
    whole = build(vectors)
    joined = PartedIndex.join(
        build(vectors[ids], ids) for ids in parts.split(np.arange(50), 12)
    )
    assert (joined.size, joined.dim, joined.metric) == (50, 6, "squared_l2")
    queries = np.concatenate([normal(9, seed=1), vectors[3:4]])
    found, truth = joined.search(queries, 7), whole.search(queries, 7)
    np.testing.assert_array_equal(found.ids, truth.ids)
    np.testing.assert_allclose(found.scores, truth.scores, rtol=1e-6, atol=1e-6)
    assert list(found.ids[-1, :2]) == [3, 40]


def test_parts_that_do_not_follow_each_other_are_refused():
    vectors = normal(10)
    halves = [build(vectors[5:], np.arange(5, 10)), build(vectors[:5])]
    with pytest.raises(ValueError, match="strictly increasing"):
        PartedIndex.join(halves)


def test_the_recall_is_that_of_the_whole():
    vectors, queries = normal(80), normal(30, seed=1)
    own = np.full(30, -7)
    queries[0], own[0] = vectors[11], 11
    groups = parts.split(np.arange(80), 30)
    exact = [build(vectors[ids], ids) for ids in groups]
    # Some rows cannot be found, most of them in one part.
    lacking = [build(vectors[ids][::2], ids[::2]) for ids in groups[:1]] + exact[1:]
    trial = Trial.make(build(vectors), queries, own, K)
    expected = trial.recall(PartedIndex.join(lacking))
    assert 0.5 < expected < 0.95
    read = lambda number: (lacking[number], exact[number])  # noqa: E731
    assert parts.recall(len(groups), read, queries, own, K) == pytest.approx(expected)
