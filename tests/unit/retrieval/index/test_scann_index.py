"""What our wrapper adds to ScaNN: ids, scores, padding, and a folder that can move."""

import dataclasses
import shutil

import numpy as np
import pytest

from realm_retro import artifacts
from realm_retro.errors import UserError
from realm_retro.retrieval.index import probe, store
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex, ScannParameters

BRUTE_FORCE = ScannParameters(num_leaves=0, leaves_to_search=1, reorder=0, tuned_k=5)
TREE = ScannParameters(num_leaves=20, leaves_to_search=8, reorder=250, tuned_k=5)
SHAPES = {"brute force": BRUTE_FORCE, "tree": TREE}


def clustered(rows, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, dim)) * rng.uniform(0.5, 3, size=(12, 1))
    noise = rng.normal(size=(rows, dim)) * 0.4
    return (centres[rng.integers(12, size=rows)] + noise).astype(np.float32)


def build(vectors, parameters, metric="squared_l2", ids=None):
    ids = np.arange(len(vectors)) * 3 + 1 if ids is None else ids
    return (
        ScannIndex.build(vectors, ids, metric=metric, parameters=parameters),
        ExactIndex.build(vectors, ids, metric=metric),
    )


@pytest.mark.parametrize("metric", ["squared_l2", "dot_product"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_queries", [1, 2, 300])
def test_it_finds_what_exact_search_finds(shape, metric, num_queries):
    vectors = clustered(1000)
    index, exact = build(vectors, SHAPES[shape], metric)
    queries = clustered(num_queries, seed=1)
    found, truth = index.search(queries, 5), exact.search(queries, 5)
    assert found.ids.dtype == np.int64
    assert found.scores.dtype == np.float32
    same = found.ids == truth.ids
    assert same.mean() > 0.95
    # What is re-ordered has its exact score, and larger is better.
    np.testing.assert_allclose(found.scores[same], truth.scores[same], atol=1e-4)
    assert (np.diff(found.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_search_for_everything_finds_everything(shape, num_queries):
    vectors = clustered(400)
    little = dataclasses.replace(SHAPES[shape], leaves_to_search=1, tuned_k=400)
    index, exact = build(vectors, little)
    for k in (400, 450):
        found = index.search(vectors[:num_queries], k)
        truth = exact.search(vectors[:num_queries], k)
        np.testing.assert_array_equal(np.sort(found.ids), np.sort(truth.ids))
        np.testing.assert_allclose(found.scores, truth.scores, atol=1e-4)


@pytest.mark.parametrize("num_queries", [1, 4])
def test_what_a_search_does_not_reach_is_missing(num_queries):
    few = dataclasses.replace(TREE, leaves_to_search=1, tuned_k=300)
    index, _ = build(clustered(400), few)
    found = index.search(clustered(400)[:num_queries], 300)
    missing = found.ids == -1
    assert missing.any()
    assert not missing[:, 0].any()
    np.testing.assert_array_equal(missing, np.isneginf(found.scores))
    # Missing ones stand at the end, and no row is found twice.
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()
    for row in found.ids:
        present = row[row >= 0]
        assert len(set(present)) == len(present)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("shape", ["brute force"])
@pytest.mark.parametrize("num_queries", [1, 2])
def test_tiny_indexes(rows, shape, num_queries):
    vectors = clustered(rows)
    index, exact = build(vectors, SHAPES[shape])
    queries = clustered(num_queries, seed=3)
    found, truth = index.search(queries, 4), exact.search(queries, 4)
    np.testing.assert_array_equal(found.ids, truth.ids)
    np.testing.assert_allclose(found.scores, truth.scores, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_vectors_and_copies(shape):
    vectors = np.zeros((300, 8), np.float16)
    vectors[200:] = 1
    index, _ = build(vectors, SHAPES[shape])
    found = index.search(np.stack([vectors[0], vectors[-1]]), 5)
    assert (found.ids[0] < 200 * 3 + 1).all()
    assert (found.ids[1] >= 200 * 3 + 1).all()
    np.testing.assert_allclose(found.scores, 0, atol=1e-5)


def test_all_vectors_zero():
    index, _ = build(np.zeros((3, 8)), BRUTE_FORCE)
    found = index.search(np.ones((1, 8)), 3)
    np.testing.assert_array_equal(np.sort(found.ids), [[1, 4, 7]])
    np.testing.assert_array_equal(found.scores, [[-8, -8, -8]])


def test_no_queries():
    index, _ = build(clustered(50), BRUTE_FORCE)
    assert index.search(np.zeros((0, 16)), 4).ids.shape == (0, 4)


def test_what_is_not_finite_is_named():
    vectors = clustered(20)
    vectors[7, 3] = np.nan
    with pytest.raises(UserError, match="chunk 22"):
        build(vectors, BRUTE_FORCE)
    index, _ = build(clustered(20), BRUTE_FORCE)
    with pytest.raises(UserError, match="query 7"):
        index.search(vectors, 2)


def test_effort_grows_with_k():
    parameters = ScannParameters(
        num_leaves=100, leaves_to_search=8, reorder=50, tuned_k=10
    )
    assert parameters.effort(3, 5000) == (50, 8)
    assert parameters.effort(10, 5000) == (50, 8)
    assert parameters.effort(25, 5000) == (125, 20)
    assert parameters.effort(4000, 5000) == (5000, 100)
    assert parameters.effort(5000, 5000) == (5000, 100)
    assert BRUTE_FORCE.effort(5, 5000) == (-1, -1)


def save(index, directory):
    stage = artifacts.Stage.open(
        directory,
        kind=store.KIND,
        format_version=store.FORMAT_VERSION,
        config={},
        parents={"embeddings": "e"},
        made_by=store.MADE_BY,
    )
    return store.save(index, stage, {"recall": 0.5})


@pytest.mark.parametrize("shape", [*SHAPES, "exact"])
def test_a_saved_index_may_move(tmp_path, shape):
    vectors = clustered(300)
    index, exact = build(vectors, SHAPES.get(shape, BRUTE_FORCE))
    index = exact if shape == "exact" else index
    save(index, tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    manifest = store.load_manifest(tmp_path / "there", parents={"embeddings": "e"})
    assert manifest.meta["backend"] == index.backend
    assert manifest.meta["size"] == 300
    assert manifest.meta["dim"] == 16
    assert manifest.meta["recall"] == 0.5
    assert not [name for name in manifest.files if name.endswith((".pkl", ".pickle"))]
    loaded = store.load(manifest)
    assert (loaded.size, loaded.dim, loaded.metric) == (300, 16, "squared_l2")
    for queries in (vectors[:1], vectors):
        for k in (3, 40):
            before, after = index.search(queries, k), loaded.search(queries, k)
            np.testing.assert_array_equal(before.ids, after.ids)
            np.testing.assert_allclose(before.scores, after.scores, atol=1e-4)


def test_a_file_that_does_not_belong_is_not_read(tmp_path):
    index, _ = build(clustered(300), TREE)
    manifest = save(index, tmp_path / "index")
    # ScaNN would unpickle a file of this name.
    (tmp_path / "index" / "scann" / "scann_docids.pkl").write_bytes(b"boom")
    with pytest.raises(UserError, match=r"scann_docids\.pkl: does not belong"):
        store.load(manifest)


def test_damage_and_unknown_backends_are_refused(tmp_path):
    index, _ = build(clustered(300), BRUTE_FORCE)
    manifest = save(index, tmp_path / "index")
    foreign = dataclasses.replace(manifest, meta={**manifest.meta, "backend": "other"})
    with pytest.raises(UserError, match="unknown backend 'other'"):
        store.load(foreign)
    path = tmp_path / "index" / "scann" / "dataset.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"dataset\.npy: is damaged"):
        store.load_manifest(tmp_path / "index")


def test_an_index_of_scann_says_when_scann_does_not_run(tmp_path, monkeypatch):
    index, _ = build(clustered(50), BRUTE_FORCE)
    manifest = save(index, tmp_path / "index")
    broken = tmp_path / "broken" / "scann"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no ScaNN today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    probe.scann_problem.cache_clear()
    try:
        with pytest.raises(UserError, match=r"no ScaNN today.*backend=exact"):
            store.load(manifest)
    finally:
        probe.scann_problem.cache_clear()
