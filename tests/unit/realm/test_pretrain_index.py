"""What a training searches: built of a version's vectors, by placement and setting."""

import jax
import numpy as np
import pytest
from realm_examples import small_realm

from realm_retro.arrays import ShardedArray
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import pretrain
from realm_retro.realm.pretrain import PretrainConfig
from realm_retro.retrieval.index.probe import scann_problem

CONFIG = small_realm()
ROWS, DIM, K = 6000, 16, 10


@pytest.fixture(scope="module")
def vectors():
    drawn = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    return ShardedArray([drawn[:4000], drawn[4000:]])


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).normal(size=(100, DIM)).astype(np.float32)


def built(rows, **settings):
    lines = []
    mesh = make_mesh(devices=jax.devices()[:2])
    settings = PretrainConfig(**settings)
    build = pretrain.index_builder(CONFIG, settings, mesh, lines.append, batch_size=4)
    return build(rows), lines


@pytest.mark.skipif(scann_problem() is not None, reason=str(scann_problem()))
def test_scann_that_is_built_again_is_as_good(vectors, queries):
    # It need not find the same: a run that goes on is not the same to the last bit.
    exact, _ = built(vectors, index="exact")
    expected = exact.search(queries, K).ids
    for _ in range(2):
        index, lines = built(vectors, index="scann")
        assert index.backend == "scann"
        assert "ScaNN finds" in lines[0]
        found = index.search(queries, K).ids
        shared = [
            len(set(a) & set(b)) / K for a, b in zip(found, expected, strict=True)
        ]
        assert np.mean(shared) > 0.9


def test_exact_search_that_is_built_again_finds_the_same(vectors, queries):
    one, two = (built(vectors, index="exact")[0].search(queries, K) for _ in range(2))
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.scores, two.scores)


def test_on_the_devices_lie_the_vectors(vectors):
    placed, lines = built(vectors, placement="device", vectors="float32")
    assert len(placed.addressable_shards) == 2
    np.testing.assert_array_equal(np.asarray(placed)[:ROWS], vectors[:])
    assert not lines
