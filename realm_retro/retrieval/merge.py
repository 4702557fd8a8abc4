"""Joins the results of indexes that hold different parts of one database."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from realm_retro.retrieval.index.base import SearchResult


def merge(parts: Sequence[SearchResult], k: int) -> SearchResult:
    """The k best of several results for the same queries.

    Ties go to the smaller id, so that the outcome depends neither on the order of the
    parts nor on how the database was split.

    Args:
      parts: results ``[q, any k]`` whose ids are disjoint.
      k: how many to keep; missing ones are filled up.

    Raises:
      ValueError: there are no parts, or they answer different numbers of queries.
    """
    if not parts:
        raise ValueError("merge needs at least one result")
    num_queries = {len(part.ids) for part in parts}
    if len(num_queries) > 1:
        raise ValueError(f"results for {sorted(num_queries)} queries do not merge")
    filler = SearchResult.missing(num_queries.pop(), k)
    ids = np.concatenate([*(part.ids for part in parts), filler.ids], axis=1)
    scores = np.concatenate([*(part.scores for part in parts), filler.scores], axis=1)
    # Missing entries score −inf and so come last.
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return SearchResult(
        ids=np.take_along_axis(ids, order, axis=1),
        scores=np.take_along_axis(scores, order, axis=1),
    )
