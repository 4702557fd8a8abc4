"""How well an index finds what exact search finds, and parameters that reach a target.

Recall@k is the share of a query's true k nearest that a search returns; a query that is
itself in the database is taken out of both. What is as near as the k-th true one counts
as found, so that copies of one text stand in for each other.

What a search misses lies in leaves that it did not visit, or lost its place when scores
were quantised. Leaves are the dear part, so they get most of the allowed loss.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator

import numpy as np

from realm_retro.retrieval.index import base
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex, ScannParameters
from realm_retro.typing import HostArray

# Below this size a tree saves too little to be worth what it misses.
MIN_ROWS_FOR_TREE = 5_000

# A sample's recall is a little off that of another: aim to lose only half as much as is
# allowed, and less if that was not enough.
_CAUTION = (0.5, 0.25, 0.1)

_LEAVES_PER_ROOT = 2.0
_SHARE_OF_LEAVES = 2 / 3
_REORDER_PER_RESULT = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50)


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """Queries whose true neighbours are known.

    Attributes:
      queries: float32 [q, d].
      own_ids: int64 [q], the id of each query if it is in the database, which is not
        to be found; any other number if it is not.
      k: neighbours looked for.
      exact: holds the database.
      truth: the true neighbours.
    """

    queries: HostArray
    own_ids: HostArray
    k: int
    exact: ExactIndex
    truth: base.SearchResult

    @classmethod
    def make(
        cls, exact: ExactIndex, queries: HostArray, own_ids: HostArray, k: int
    ) -> Trial:
        """Finds the true neighbours by exact search."""
        truth = best_others(exact, exact, queries, own_ids, k)
        return cls(queries, own_ids, k, exact, truth)

    def recall(self, index: base.Index) -> float:
        """Recall@k of `index`, from 0 to 1; 1 where there is nothing to be found."""
        found = best_others(index, self.exact, self.queries, self.own_ids, self.k)
        return share_found(self.truth, found)


def best_others(
    index: base.Index,
    exact: ExactIndex,
    queries: HostArray,
    own_ids: HostArray,
    k: int,
) -> base.SearchResult:
    """What `index` finds but the queries themselves; scores are of `exact`, float64."""
    found = index.search(queries, k + 1)
    others = found.only(found.ids != own_ids[:, None], k)
    return base.SearchResult(others.ids, _true_scores(exact, queries, others.ids))


def share_found(truth: base.SearchResult, found: base.SearchResult) -> float:
    """Recall of `found`, scores of both being true; 1 where nothing is to be found."""
    present = truth.ids != base.MISSING_ID
    worst = np.where(present, truth.scores, np.inf).min(axis=1, initial=np.inf)
    hits = int((found.scores >= worst[:, None]).sum())
    possible = int(present.sum())
    return hits / possible if possible else 1.0


def _true_scores(exact: ExactIndex, queries: HostArray, ids: HostArray) -> HostArray:
    """Scores in float64 [q, k], −inf where missing: the index's own may be rounded."""
    rows = np.searchsorted(exact.ids, np.maximum(ids, exact.ids[0]))
    vectors = exact.vectors[rows].astype(np.float64)
    if exact.metric == "squared_l2":
        scores = -np.square(vectors - queries[:, None]).sum(axis=-1)
    else:
        scores = np.einsum("qkd,qd->qk", vectors, queries.astype(np.float64))
    return np.where(ids == base.MISSING_ID, -np.inf, scores)


def build(
    exact: ExactIndex, queries: HostArray, own_ids: HostArray, *, k: int, target: float
) -> tuple[ScannIndex, float]:
    """A ScaNN index over the vectors of `exact`, tuned on queries, measured on others.

    Args:
      exact: holds the vectors and their ids, and gives the truth.
      queries: float32 [q, d], q ≥ 1: half to tune on, half to measure on.
      own_ids: int64 [q], see `Trial`.
      k: neighbours that will be asked for.
      target: the recall@k to reach, above 0 and at most 1.

    Returns:
      The index, and the recall@k that it was measured to have: below `target` only if
      the greatest effort does not reach it.
    """
    index = ScannIndex.build(
        exact.vectors,
        exact.ids,
        metric=exact.metric,
        parameters=initial_parameters(exact.size, k),
    )
    half = -(-len(queries) // 2)
    to_tune, to_measure = (
        Trial.make(exact, queries[part], own_ids[part], k)
        # A single query serves as both.
        for part in (slice(half), slice(-half, None))
    )
    recall = 0.0
    for caution in _CAUTION:
        index = tune(index, to_tune, 1 - (1 - target) * caution)
        recall = to_measure.recall(index)
        if recall >= target:
            break
    return index, recall


def initial_parameters(size: int, k: int) -> ScannParameters:
    """The shape of an index of `size` rows; how it is searched is for `tune`."""
    leaves = round(_LEAVES_PER_ROOT * math.sqrt(size))
    return ScannParameters(
        num_leaves=leaves if size >= MIN_ROWS_FOR_TREE else 0,
        leaves_to_search=1,
        reorder=k * _REORDER_PER_RESULT[-1],
        tuned_k=k + 1,
    )


def tune(index: ScannIndex, trial: Trial, recall: float) -> ScannIndex:
    """The same index, searched just hard enough for a recall on `trial`.

    Where the recall cannot be reached, everything is searched.
    """
    start = index.parameters
    if not start.num_leaves:
        return index
    index = _first(
        (
            dataclasses.replace(start, leaves_to_search=leaves)
            for leaves in _leaves(start.num_leaves)
        ),
        index,
        trial,
        1 - (1 - recall) * _SHARE_OF_LEAVES,
    )
    found = index.parameters
    return _first(
        (
            dataclasses.replace(found, reorder=reorder)
            for reorder in (trial.k * n for n in _REORDER_PER_RESULT)
        ),
        index,
        trial,
        recall,
    )


def _first(
    candidates: Iterator[ScannParameters],
    index: ScannIndex,
    trial: Trial,
    recall: float,
) -> ScannIndex:
    """`index` with the first parameters that reach a recall, or else the last."""
    for parameters in candidates:
        index = dataclasses.replace(index, parameters=parameters)
        if trial.recall(index) >= recall:
            break
    return index


def _leaves(num_leaves: int) -> Iterator[int]:
    """Numbers of leaves to try: rising by a tenth, up to all of them."""
    leaves = 1
    while leaves < num_leaves:
        yield leaves
        leaves = max(leaves + 1, round(leaves * 1.1))
    yield num_leaves


def queries_per_second(
    index: base.Index, queries: HostArray, *, k: int, batch: int, seconds: float = 0.3
) -> float:
    """Speed of searches for k neighbours in batches, after a first one to warm up."""
    batches = [queries[i : i + batch] for i in range(0, len(queries), batch)]
    index.search(batches[0], k)
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        done += len(index.search(batches[done // batch % len(batches)], k).ids)
    return done / elapsed
