"""Recall is counted honestly, and tuning reaches a target without wasting effort."""

import dataclasses

import numpy as np
import pytest

from realm_retro.retrieval.index import tuning
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex
from realm_retro.retrieval.index.tuning import Trial


@dataclasses.dataclass(frozen=True, eq=False)
class Partial:
    """Exact search that loses the hits that `lose` marks, by rank."""

    exact: ExactIndex
    lose: tuple[int, ...]

    def search(self, queries, k):
        found = self.exact.search(queries, k)
        keep = ~np.isin(np.arange(k), self.lose)
        return found.only(np.broadcast_to(keep, found.ids.shape), k)


def exact_of(vectors, metric="squared_l2"):
    ids = np.arange(len(vectors)) * 2 + 5
    return ExactIndex.build(vectors, ids, metric=metric)


def normal(rows, dim=8, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


@pytest.mark.parametrize("metric", ["squared_l2", "dot_product"])
def test_recall_counts_what_is_found(metric):
    exact = exact_of(normal(200), metric)
    trial = Trial.make(exact, normal(20, seed=1), np.full(20, -7), 4)
    assert trial.recall(exact) == 1
    assert trial.recall(Partial(exact, (0,))) == 0.75
    assert trial.recall(Partial(exact, (1, 3))) == 0.5
    # The fifth is not among the four that are looked for.
    assert trial.recall(Partial(exact, (4,))) == 1


def test_finding_oneself_is_no_merit():
    exact = exact_of(normal(200))
    queries, own = exact.vectors[:30], exact.ids[:30]
    trial = Trial.make(exact, queries, own, 4)
    assert trial.recall(exact) == 1
    # Rank 0 is the query itself: to lose it costs nothing, to lose another does.
    assert trial.recall(Partial(exact, (0,))) == 1
    assert trial.recall(Partial(exact, (0, 2))) == 0.75


def test_a_copy_is_as_good_as_the_original():
    vectors = np.repeat(normal(50), 2, axis=0)
    exact = exact_of(vectors)
    trial = Trial.make(exact, vectors[::2], np.full(50, -7), 1)
    # The copy has the larger id, so it is not among the true one.
    assert trial.recall(Partial(exact, (0,))) == 1
    assert trial.recall(Partial(exact, (0, 1))) == 0


def test_a_database_of_one():
    exact = exact_of(normal(1))
    alone = Trial.make(exact, exact.vectors, exact.ids, 3)
    assert alone.recall(exact) == 1
    other = Trial.make(exact, exact.vectors, np.array([-7]), 3)
    assert other.recall(exact) == 1
    assert other.recall(Partial(exact, (0,))) == 0


def test_shape_follows_size():
    assert tuning.initial_parameters(100, 10).num_leaves == 0
    large = tuning.initial_parameters(40_000, 10)
    assert (large.num_leaves, large.tuned_k) == (400, 11)


def test_without_a_tree_there_is_nothing_to_tune():
    exact = exact_of(normal(60))
    parameters = tuning.initial_parameters(60, 3)
    index = ScannIndex.build(
        exact.vectors, exact.ids, metric="squared_l2", parameters=parameters
    )
    trial = Trial.make(exact, normal(5, seed=1), np.full(5, -7), 3)
    assert trial.recall(index) == 1
    assert tuning.tune(index, trial, 0.9) is index


@pytest.fixture(scope="module")
def untuned():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(300, 16))
    noise = rng.normal(size=(4300, 16)) * 0.5
    vectors = (centres[rng.integers(300, size=4300)] + noise).astype(np.float32)
    exact = exact_of(vectors[:4000])
    parameters = dataclasses.replace(tuning.initial_parameters(4000, 5), num_leaves=60)
    index = ScannIndex.build(
        exact.vectors, exact.ids, metric="squared_l2", parameters=parameters
    )
    return index, Trial.make(exact, vectors[4000:], np.full(300, -7), 5)


def test_a_higher_target_costs_more_and_is_reached(untuned):
    index, trial = untuned
    low, high = (tuning.tune(index, trial, target) for target in (0.8, 0.97))
    for tuned, target in ((low, 0.8), (high, 0.97)):
        assert trial.recall(tuned) >= target
        assert tuned.parameters.num_leaves == 60
    assert low.parameters.leaves_to_search < high.parameters.leaves_to_search < 60
    one_less = dataclasses.replace(
        low.parameters, leaves_to_search=low.parameters.leaves_to_search - 1
    )
    generous = dataclasses.replace(one_less, reorder=index.parameters.reorder)
    one_less = dataclasses.replace(index, parameters=generous)
    assert trial.recall(one_less) < 1 - 0.2 * tuning._SHARE_OF_LEAVES


def test_an_impossible_target_ends_with_everything_searched(untuned):
    index, trial = untuned
    tuned = tuning.tune(index, trial, 1.1)
    assert tuned.parameters.leaves_to_search == 60
    assert tuned.parameters.reorder == index.parameters.reorder


def test_a_built_index_reaches_its_target_on_queries_it_was_not_tuned_on(untuned):
    _, trial = untuned
    queries, own = trial.queries[:200], np.full(200, -7)
    built, recall = tuning.build(trial.exact, queries, own, k=5, target=0.9)
    assert recall >= 0.9
    unseen = Trial.make(trial.exact, trial.queries[200:], np.full(100, -7), 5)
    assert unseen.recall(built) > 0.85


def test_a_single_query_is_enough_to_build(untuned):
    _, trial = untuned
    queries, own = trial.queries[:1], np.full(1, -7)
    _, recall = tuning.build(trial.exact, queries, own, k=5, target=0.9)
    assert recall >= 0.9


def test_speed_is_of_whole_batches():
    exact = exact_of(normal(100))
    for batch in (1, 7, 500):
        assert (
            tuning.queries_per_second(exact, normal(20), k=3, batch=batch, seconds=0.01)
            > 0
        )
