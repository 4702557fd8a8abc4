"""Exact search is a stable sort of all scores, whatever the blocks and buckets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro.errors import UserError
from realm_retro.retrieval.index import exact
from realm_retro.retrieval.index.exact import ExactIndex


def brute_force(vectors, ids, queries, k, metric):
    """A sort of float64 scores, ties by id."""
    products = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    if metric == "squared_l2":
        distances = (
            np.square(queries.astype(np.float64)).sum(1)[:, None]
            + np.square(vectors.astype(np.float64)).sum(1)[None, :]
            - 2 * products
        )
        products = -distances
    order = np.lexsort((np.broadcast_to(ids, products.shape), -products), axis=-1)
    order = order[:, :k]
    return ids[order], np.take_along_axis(products, order, axis=1)


@given(
    rows=st.integers(1, 40),
    num_queries=st.integers(0, 9),
    k=st.integers(1, 50),
    block_rows=st.sampled_from([4, 16, 64]),
    metric=st.sampled_from(["squared_l2", "dot_product"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_it_is_a_stable_sort(rows, num_queries, k, block_rows, metric, seed):
    rng = np.random.default_rng(seed)
    # Small integers: many exact ties, and no rounding.
    vectors = rng.integers(-2, 3, (rows, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (num_queries, 3)).astype(np.float32)
    ids = np.sort(rng.choice(1000, rows, replace=False))
    index = ExactIndex.build(vectors, ids, metric=metric, block_rows=block_rows)
    result = index.search(queries, k)
    want_ids, want_scores = brute_force(vectors, ids, queries, k, metric)
    found = min(k, rows)
    np.testing.assert_array_equal(result.ids[:, :found], want_ids)
    np.testing.assert_array_equal(result.scores[:, :found], want_scores)
    assert result.ids.shape == result.scores.shape == (num_queries, k)
    assert result.ids.dtype == np.int64
    assert result.scores.dtype == np.float32
    assert (result.ids[:, found:] == -1).all()
    assert np.isneginf(result.scores[:, found:]).all()


def test_padding_does_not_beat_negative_products():
    vectors = -np.ones((5, 2), np.float32)
    index = ExactIndex.build(vectors, np.arange(5), metric="dot_product", block_rows=4)
    result = index.search(np.ones((1, 2)), 5)
    np.testing.assert_array_equal(result.ids, [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(result.scores, -2.0 * np.ones((1, 5)))


def test_blocks_that_are_not_resident_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    ids = np.arange(300)
    whole = ExactIndex.build(vectors, ids, metric="squared_l2").search(vectors, 7)
    monkeypatch.setattr(exact, "RESIDENT_BYTES", 2 * 64 * 8 * 4)
    index = ExactIndex.build(vectors, ids, metric="squared_l2", block_rows=64)
    parts = index.search(vectors, 7)
    assert len(index._resident) == 2
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_allclose(whole.scores, parts.scores, atol=1e-5)


def test_a_vector_is_at_no_distance_from_itself():
    vectors = 10 + np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    result = ExactIndex.build(vectors, np.arange(50), metric="squared_l2").search(
        vectors, 1
    )
    np.testing.assert_array_equal(result.ids[:, 0], np.arange(50))
    assert (result.scores <= 0).all()
    np.testing.assert_allclose(result.scores, 0, atol=0.01)


def test_batches_of_all_sizes_share_compiled_programs():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, 4)).astype(np.float32)
    index = ExactIndex.build(vectors, np.arange(100), metric="dot_product")
    index.search(vectors[:8], 8)
    before = exact._fold._cache_size()
    for size in (5, 6, 7, 8):
        index.search(vectors[:size], size)
    assert exact._fold._cache_size() == before
    # A second index of the same shape too: its vectors are arguments, not constants.
    other = ExactIndex.build(vectors[::-1], np.arange(100), metric="squared_l2")
    other.search(vectors[:8], 8)
    assert exact._fold._cache_size() == before


def test_more_queries_than_one_batch():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    queries = rng.normal(size=(exact.MAX_QUERIES + 3, 4)).astype(np.float32)
    index = ExactIndex.build(vectors, np.arange(60), metric="squared_l2")
    want, _ = brute_force(vectors, np.arange(60), queries, 3, "squared_l2")
    np.testing.assert_array_equal(index.search(queries, 3).ids, want)


def test_half_precision_and_zero_vectors():
    vectors = np.array([[0, 0], [1, 0], [0, 0]], np.float16)
    index = ExactIndex.build(vectors, np.array([3, 5, 9]), metric="squared_l2")
    result = index.search(np.zeros((1, 2), np.float16), 3)
    np.testing.assert_array_equal(result.ids, [[3, 9, 5]])
    np.testing.assert_array_equal(result.scores, [[0, 0, -1]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_not_finite_is_named(bad):
    vectors = np.ones((4, 3), np.float32)
    vectors[2, 1] = bad
    with pytest.raises(UserError, match=r"chunk 70 .*\(1 of 4 do\)"):
        ExactIndex.build(vectors, np.array([5, 6, 70, 71]), metric="squared_l2")
    index = ExactIndex.build(np.ones((4, 3)), np.arange(4), metric="squared_l2")
    with pytest.raises(UserError, match=r"query 2 .*\(1 of 4 do\)"):
        index.search(vectors, 1)


@pytest.mark.parametrize("ids", [[0, 2, 1], [0, 1, 1], [-1, 0, 1], [0, 1]])
def test_ids_must_rise(ids):
    with pytest.raises(ValueError, match="ids"):
        ExactIndex.build(np.ones((3, 2)), np.array(ids), metric="squared_l2")


@pytest.mark.parametrize(("shape", "k"), [((2, 3), 0), ((2, 4), 1), ((3,), 1)])
def test_wrong_shapes_are_refused(shape, k):
    index = ExactIndex.build(np.ones((3, 3)), np.arange(3), metric="squared_l2")
    with pytest.raises(ValueError, match=r"k is 0|index wants"):
        index.search(np.ones(shape), k)
