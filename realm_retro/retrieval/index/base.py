"""What every index is: vectors in, ids and scores of the nearest out, best first."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import numpy as np

from realm_retro.artifacts import Stage
from realm_retro.errors import UserError
from realm_retro.typing import HostArray, JsonDict

Metric = Literal["squared_l2", "dot_product"]
METRICS: tuple[Metric, ...] = ("squared_l2", "dot_product")

MISSING_ID = -1
MISSING_SCORE = -np.inf


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The nearest of each query, best first.

    Attributes:
      ids: int64 ``[q, k]``; −1 where fewer than k were found.
      scores: float32 ``[q, k]``; larger is better under every metric (a squared
        distance is negated), −inf where the id is −1.
    """

    ids: HostArray
    scores: HostArray

    @classmethod
    def missing(cls, num_queries: int, k: int) -> SearchResult:
        """A result in which nothing was found."""
        return cls(
            ids=np.full((num_queries, k), MISSING_ID, np.int64),
            scores=np.full((num_queries, k), MISSING_SCORE, np.float32),
        )

    def only(self, keep: HostArray, k: int) -> SearchResult:
        """The first k of each row among those that ``keep`` (bool, like ids) marks.

        Where fewer than k are left, −1 and −inf follow.
        """
        result = SearchResult.missing(len(self.ids), k)
        place = np.cumsum(keep, axis=1) - 1
        row, column = np.nonzero(keep & (place < k))
        result.ids[row, place[row, column]] = self.ids[row, column]
        result.scores[row, place[row, column]] = self.scores[row, column]
        return result


class Index(Protocol):
    """What the rest of the package knows of an index; threads may share it."""

    @property
    def backend(self) -> str:
        """``exact`` or ``scann``."""
        ...

    @property
    def metric(self) -> Metric:
        """What its scores mean."""
        ...

    @property
    def ids(self) -> HostArray:
        """int64 ``[N]``, strictly increasing: the global id of each row."""
        ...

    @property
    def size(self) -> int:
        """N, the number of vectors."""
        ...

    @property
    def dim(self) -> int:
        """The width of a vector."""
        ...

    def search(self, queries: HostArray, k: int) -> SearchResult:
        """The k best of each of ``queries [q, dim]``."""
        ...

    def describe(self) -> JsonDict:
        """Its parameters, as JSON values."""
        ...

    def save(self, stage: Stage) -> None:
        """Writes its files into a stage; `index.store.load` reads them."""
        ...


def check_queries(queries: HostArray, *, dim: int, k: int) -> HostArray:
    """Queries as float32 ``[q, dim]``.

    Raises:
      ValueError: k is less than 1, or the shape is not ``[q, dim]``.
      UserError: a query holds NaN or an infinity.
    """
    if k < 1:
        raise ValueError(f"k is {k}; a search needs at least 1")
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(
            f"queries have shape {queries.shape}, the index wants [q, {dim}]"
        )
    # One dot product costs a live search of one query less than a mask would.
    if not np.isfinite(np.vdot(queries, queries)):
        bad = np.flatnonzero(~np.isfinite(squared_norms(queries)))
        if bad.size:
            raise UserError(
                f"query {bad[0]} holds NaN, an infinity or values too large"
                f" ({bad.size} of {len(queries)} do); embed its text again"
            )
    return queries


def check_ids(ids: HostArray, *, num_rows: int) -> HostArray:
    """Ids as int64 ``[N]``, strictly increasing, so that row order is id order.

    Raises:
      ValueError: they are not, or there is not one id per row.
    """
    ids = np.ascontiguousarray(ids, np.int64)
    if ids.shape != (num_rows,):
        raise ValueError(f"{ids.shape} ids for {num_rows} vectors")
    if ids.size and (ids[0] < 0 or (np.diff(ids) <= 0).any()):
        raise ValueError("index ids must be strictly increasing and not negative")
    return ids


def check_vectors(vectors: HostArray, ids: HostArray) -> HostArray:
    """Vectors as contiguous float32 ``[N, d]``.

    Raises:
      UserError: one of them holds NaN or an infinity; its chunk is named.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    bad = np.flatnonzero(~np.isfinite(squared_norms(vectors)))
    if bad.size:
        raise UserError(
            f"the embedding of chunk {ids[bad[0]]} holds NaN, an infinity or values too"
            f" large ({bad.size} of {len(ids)} do); delete the embeddings and run:"
            " python -m realm_retro.cli.embed"
        )
    return vectors


def squared_norms(vectors: HostArray) -> HostArray:
    """Squared length of each row, float32 ``[N]``; infinite where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.einsum("nd,nd->n", vectors, vectors)
