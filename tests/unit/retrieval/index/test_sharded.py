import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.retrieval.index import sharded

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def mesh_of(shape):
    data, fsdp, tensor = shape
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshConfig(data, fsdp, tensor), devices)


def slow_search(vectors, queries, k):
    """Every score, sorted by score and then by row; float64."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.tile(np.arange(len(vectors)), (len(queries), 1))
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.fixture
def vectors():
    # Small integers: equal scores are common, and every sum is exact.
    return np.random.default_rng(0).integers(-3, 4, (61, 6)).astype(np.float32)


@pytest.fixture
def queries():
    return np.random.default_rng(1).integers(-3, 4, (5, 6)).astype(np.float32)


def search(mesh, vectors, queries, k, **options):
    placed = sharded.place(vectors, mesh)
    run = jax.jit(
        lambda placed, queries: sharded.search(
            mesh, placed, len(vectors), queries, k, **options
        )
    )
    return [np.asarray(x) for x in run(placed, queries)]


@pytest.mark.parametrize("shape", MESHES)
def test_finds_the_best_and_breaks_ties_by_row(vectors, queries, shape):
    rows, scores = search(mesh_of(shape), vectors, queries, 7)
    expected_rows, expected_scores = slow_search(vectors, queries, 7)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


def test_more_than_a_device_holds(vectors, queries):
    """k = 20 of 8 rows a device: the merge must take all of some device."""
    rows, _ = search(mesh_of((8, 1, 1)), vectors, queries, 20)
    np.testing.assert_array_equal(rows, slow_search(vectors, queries, 20)[0])


def test_padding_never_wins(queries):
    """All real scores are negative, where a padded row of zeros would score 0."""
    vectors = -np.ones((9, 6), np.float32)
    rows, scores = search(mesh_of((8, 1, 1)), vectors, np.abs(queries) + 1, 12)
    np.testing.assert_array_equal(np.sort(rows[:, :9]), np.tile(np.arange(9), (5, 1)))
    assert (rows[:, 9:] == -1).all()
    assert np.isneginf(scores[:, 9:]).all()


def test_blocks_are_folded_in_order(vectors, queries, monkeypatch):
    monkeypatch.setattr(sharded, "BLOCK_ROWS", 8)
    rows, _ = search(mesh_of((2, 1, 1)), vectors, queries, 7)
    np.testing.assert_array_equal(rows, slow_search(vectors, queries, 7)[0])


def test_a_new_version_does_not_compile_anew(vectors, queries):
    mesh = mesh_of((8, 1, 1))
    run = jax.jit(
        lambda placed, queries: sharded.search(mesh, placed, len(vectors), queries, 3)
    )
    run(sharded.place(vectors, mesh), queries)
    found, _ = run(sharded.place(vectors[::-1], mesh), queries)
    assert run._cache_size() == 1
    expected, _ = slow_search(vectors[::-1], queries, 3)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_approximate_search_is_exact_off_the_tpu(vectors, queries):
    rows, _ = search(mesh_of((1, 1, 1)), vectors, queries, 7, recall_target=0.9)
    scores = queries @ vectors.T
    worst = np.sort(scores, axis=1)[:, -7]
    assert (np.take_along_axis(scores, rows, axis=1) >= worst[:, None]).all()


def test_vectors_may_be_of_half_precision(vectors, queries):
    mesh = mesh_of((8, 1, 1))
    placed = sharded.place(vectors, mesh, dtype=jnp.bfloat16)
    assert placed.dtype == jnp.bfloat16
    # Integers this small are exact in bfloat16, and sums are kept in float32.
    rows, _ = sharded.search(mesh, placed, len(vectors), jnp.asarray(queries), 7)
    np.testing.assert_array_equal(rows, slow_search(vectors, queries, 7)[0])
