"""The passages' index: exact where that is as good, else as exact as is asked for."""

import numpy as np
import pytest

from realm_retro.errors import UserError
from realm_retro.realm import search
from realm_retro.retrieval.index import probe, tuning
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex

ROWS = tuning.MIN_ROWS_FOR_TREE + 1000
K = 20


def vectors_of(rows, seed=0):
    """Clustered, as passages are, and of different lengths; float32 [rows, 24]."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(200, 24))
    noise = rng.normal(size=(rows, 24)) * 0.7
    return (centres[rng.integers(200, size=rows)] + noise).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    return vectors_of(ROWS)


@pytest.fixture(scope="module")
def trial(vectors):
    """Queries that are no passages, with the truth."""
    exact = ExactIndex.build(vectors, np.arange(ROWS), metric="dot_product")
    return tuning.Trial.make(exact, vectors_of(300, seed=1), np.full(300, -7), K)


def test_a_large_corpus_is_searched_with_the_recall_that_is_told(vectors, trial):
    said = []
    index = search.build_index(vectors, k=K, report=said.append)
    assert index.backend == "scann"
    assert trial.recall(index) >= search.RECALL_TARGET - 0.02
    [line] = said
    assert line.startswith("index: ScaNN finds 9")
    assert f"% of the {K} best of {ROWS:,} passages" in line
    untuned = ScannIndex.build(
        vectors,
        np.arange(ROWS),
        metric="dot_product",
        parameters=tuning.initial_parameters(ROWS, K),
    )
    assert trial.recall(untuned) < 0.8


@pytest.mark.parametrize(
    ("rows", "k"), [(tuning.MIN_ROWS_FOR_TREE - 1, 10), (ROWS, 5000), (40, 100)]
)
def test_where_a_tree_does_not_pay_search_is_exact(rows, k):
    said = []
    index = search.build_index(vectors_of(rows), k=k, report=said.append)
    assert index.backend == "exact"
    assert not said


def test_a_few_passages_may_be_searched_with_scann():
    index = search.build_index(vectors_of(40), backend="scann", k=100)
    assert index.backend == "scann"
    assert (index.search(vectors_of(5), 40).ids >= 0).all()


@pytest.fixture
def no_scann(tmp_path, monkeypatch):
    broken = tmp_path / "scann"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('no ScaNN today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe.scann_problem.cache_clear()
    yield
    probe.scann_problem.cache_clear()


@pytest.mark.usefixtures("no_scann")
def test_without_scann_it_searches_exactly_or_says_so(vectors):
    said = []
    index = search.build_index(vectors, k=K, report=said.append)
    assert index.backend == "exact"
    [line] = said
    assert "does not run here (ImportError: no ScaNN today); searching exactly" in line
    with pytest.raises(
        UserError, match="index=scann: ScaNN does not run here"
    ) as error:
        search.build_index(vectors, backend="scann", k=K)
    assert "\n" not in str(error.value)


def test_a_recall_below_the_target_is_not_used(vectors, monkeypatch):
    monkeypatch.setattr(tuning, "_REORDER_PER_RESULT", (1,))
    monkeypatch.setattr("realm_retro.retrieval.index.scann.DIMS_PER_BLOCK", 24)
    said = []
    assert search.build_index(vectors, k=K, report=said.append).backend == "exact"
    [line] = said
    assert "less than 95%; searching exactly" in line
    with pytest.raises(UserError, match="less than 95%; set index to auto or exact"):
        search.build_index(vectors, backend="scann", k=K)


def test_the_sample_stays_small_in_memory():
    exact = ExactIndex.build(vectors_of(4000), np.arange(4000), metric="dot_product")
    assert len(search._sample(exact, 10)[0]) == 2 * search._MAX_TRIALS
    queries, ids = search._sample(exact, 3000)
    assert len(queries) < 2 * search._MAX_TRIALS + 1
    assert len(queries) * 3000 * exact.dim * 8 <= 2 * search._TRIAL_BYTES
    np.testing.assert_array_equal(queries, exact.vectors[ids])
