"""Neighbours are the best of other documents: filtered first, cut afterwards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro.errors import UserError
from realm_retro.retrieval import neighbours
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex, ScannParameters
from realm_retro.retrieval.neighbours import Filter, NeighboursConfig, NeighbourTable


def slow(vectors, document, ids, queries, own, k):
    """Every allowed chunk sorted by distance, then id."""
    result = np.full((len(queries), k), -1)
    for row, (query, mine) in enumerate(zip(queries, own, strict=True)):
        allowed = [i for i in ids if document[i] != mine]
        distance = {i: np.square(vectors[i] - query).sum() for i in allowed}
        best = sorted(allowed, key=lambda i: (distance[i], i))[:k]
        result[row, : len(best)] = best
    return result


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    k=st.integers(1, 6),
    margin=st.integers(0, 3),
    held_out=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_slow_filter(sizes, k, margin, held_out, seed):
    rng = np.random.default_rng(seed)
    document = np.repeat(np.arange(len(sizes)), sizes)
    vectors = rng.integers(-2, 3, (len(document), 2)).astype(np.float32)
    # The chunks of one document may be missing from the index, as held-out ones are.
    ids = np.flatnonzero(document != held_out)
    index = ExactIndex.build(vectors[ids], ids, metric="squared_l2")
    finder = Filter.make(index, document)
    own = document.copy()
    own[rng.random(len(own)) < 0.2] = -1  # queries of no document
    result = finder.find(vectors, own, k=k, margin=margin)
    want = slow(vectors, document, ids, vectors, own, k)
    np.testing.assert_array_equal(result.ids, want)
    np.testing.assert_array_equal(result.ids == -1, np.isneginf(result.scores))


def test_a_single_document_has_no_neighbours_and_is_not_searched():
    class Unused:
        size, ids = 5, np.arange(5)

        def search(self, queries, k):
            raise AssertionError("nothing can be found")

    finder = Filter.make(Unused(), np.zeros(5, int))
    result = finder.find(np.ones((5, 2)), np.zeros(5, int), k=3, margin=2)
    assert (result.ids == -1).all()
    assert np.isneginf(result.scores).all()


def test_a_document_that_fills_the_front_is_searched_past(monkeypatch):
    # 300 copies of one text in document 0; the others are far away.
    vectors = np.zeros((310, 4), np.float32)
    vectors[300:] = 5 + np.arange(10)[:, None]
    document = np.r_[np.zeros(300, int), np.arange(1, 11)]
    index = ExactIndex.build(vectors, np.arange(310), metric="squared_l2")
    depths = []
    search = index.search

    class Counted:
        size, ids = index.size, index.ids

        def search(self, queries, k):
            depths.append((len(queries), k))
            return search(queries, k)

    # Few hits at a time: rows that look deep go in several parts.
    monkeypatch.setattr(neighbours, "_MAX_HITS", 5000)
    finder = Filter.make(Counted(), document)
    result = finder.find(vectors, document, k=2, margin=3)
    assert (result.ids[:300] == [300, 301]).all()
    assert (result.ids[300:, 0] != np.arange(300, 310)).all()
    assert max(depth for _, depth in depths) == 310
    assert all(rows * depth <= 5000 + 310 for rows, depth in depths)
    # Only the rows that need it look deeper.
    assert sum(rows for rows, depth in depths if depth == 310) == 300


def test_an_approximate_index_leaves_no_row_short():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 8)).astype(np.float32)
    document = np.repeat(np.arange(3), 200)
    index = ScannIndex.build(
        vectors,
        np.arange(600),
        metric="squared_l2",
        parameters=ScannParameters(
            num_leaves=30, leaves_to_search=1, reorder=20, tuned_k=300
        ),
    )
    finder = Filter.make(index, document)
    result = finder.find(vectors, document, k=100, margin=0)
    assert (result.ids >= 0).all()
    assert (document[result.ids] != document[:, None]).all()


def write_table(directory, ids, scores, shard_size):
    config = NeighboursConfig(k=ids.shape[1], shard_size=shard_size)
    stage = neighbours.open_stage(directory, config=config, parents={"index": "i"})
    starts = range(0, len(ids), shard_size)
    for number, start in enumerate(starts):
        for part, array in (("ids", ids), ("scores", scores)):
            name = neighbours.shard_name(part, number, len(starts))
            with stage.write(name) as path, path.open("wb") as file:
                np.save(file, array[start : start + shard_size])
    stage.commit({"num_shards": len(starts)})


def test_a_table_is_read_back(tmp_path):
    ids = np.arange(21).reshape(7, 3)
    write_table(tmp_path, ids, -ids.astype(np.float32), shard_size=3)
    table = NeighbourTable.open(tmp_path, parents={"index": "i"})
    assert table.k == 3
    np.testing.assert_array_equal(table.ids[:], ids)
    np.testing.assert_array_equal(table.scores[:], -ids.astype(np.float32))
    assert table.fingerprint == table.manifest.fingerprint
    with pytest.raises(UserError, match="was made from index i"):
        NeighbourTable.open(tmp_path, parents={"index": "j"})


@pytest.mark.parametrize("field", ["k", "batch_size", "shard_size"])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        NeighboursConfig(**{field: 0})
    with pytest.raises(ValueError, match="margin=-1 must not be negative"):
        NeighboursConfig(margin=-1)
