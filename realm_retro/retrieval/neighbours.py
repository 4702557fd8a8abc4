"""The k nearest chunks of every chunk, none of its own document (section 2.2).

Kind ``neighbours``: row i holds the neighbours of chunk i, best first, −1 where fewer
were found. Files: ``ids-00000-of-00003.npy`` int64 [rows, k] and
``scores-00000-of-00003.npy`` float32 [rows, k], memory-mapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath

from realm_retro import artifacts
from realm_retro.arrays import ShardedArray
from realm_retro.retrieval.index.base import MISSING_ID, Index, SearchResult
from realm_retro.typing import HostArray

KIND = "neighbours"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.find_neighbours"


@dataclasses.dataclass(frozen=True)
class NeighboursConfig:
    """The ``neighbours`` section of a config.

    Attributes:
      k: neighbours kept of each chunk; the most that training or evaluation can use.
      margin: how many more are asked for at first, to make up for dropped ones.
      batch_size: queries at a time.
      shard_size: rows of a file, the unit of resuming.
    """

    k: int = 4
    margin: int = 12
    batch_size: int = 1024
    shard_size: int = 65_536

    def __post_init__(self) -> None:
        for name in ("k", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.margin < 0:
            raise ValueError(f"margin={self.margin} must not be negative")


@dataclasses.dataclass(frozen=True)
class NeighbourTable:
    """Neighbours of all chunks.

    Attributes:
      ids: int64 [N, k], chunk ids, −1 where missing.
      scores: float32 [N, k], −inf where missing.
      manifest: of the artefact.
    """

    ids: ShardedArray
    scores: ShardedArray
    manifest: artifacts.Manifest

    @classmethod
    def open(
        cls,
        directory: epath.PathLike,
        *,
        parents: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> NeighbourTable:
        """Opens a finished table.

        Args:
          directory: where it lies.
          parents: role (``chunks``, ``embeddings``, ``index``) → fingerprint that it
            must come from.
          verify: recompute checksums.

        Raises:
          UserError: it is missing, unfinished, damaged, or of other parents.
        """
        manifest = artifacts.load(
            directory,
            kind=KIND,
            format_version=FORMAT_VERSION,
            made_by=MADE_BY,
            parents=parents,
            verify=verify,
        )
        shards = range(manifest.meta["num_shards"])
        ids, scores = (
            ShardedArray.open(
                [manifest.path(shard_name(part, i, len(shards))) for i in shards]
            )
            for part in ("ids", "scores")
        )
        return cls(ids, scores, manifest)

    @property
    def fingerprint(self) -> str:
        """The artefact's fingerprint."""
        return self.manifest.fingerprint

    @property
    def k(self) -> int:
        """Neighbours held of each chunk."""
        return self.ids.shape[1]


def shard_name(part: str, shard: int, num_shards: int) -> str:
    """File name of the ids or scores of one shard."""
    return f"{part}-{shard:05d}-of-{num_shards:05d}.npy"


def find(
    index: Index,
    queries: HostArray,
    query_documents: HostArray,
    document: ShardedArray | HostArray,
    *,
    k: int,
    margin: int,
) -> SearchResult:
    """The k best of each query that are not of the query's own document.

    More than k are searched, filtered, and only then cut to k (a chunk is not always
    its own nearest, and a document may fill the whole front). Rows left short are
    searched again, twice as deep each time, until they are full or the index is
    exhausted.

    Args:
      index: ids are chunk ids.
      queries: float32 [q, d].
      query_documents: int [q], row of the document that each query is of; −1 for a
        query that is of none.
      document: int [N], row of each chunk's document.
      k: how many to keep.
      margin: how many more to ask for at first.
    """
    result = SearchResult.missing(len(queries), k)
    rows, depth = np.arange(len(queries)), k + margin
    while len(rows):
        depth = min(depth, index.size)
        found = index.search(queries[rows], depth)
        ids, scores = _keep(
            found, query_documents[rows], document, min(k, found.ids.shape[1])
        )
        result.ids[rows, : ids.shape[1]] = ids
        result.scores[rows, : ids.shape[1]] = scores
        if depth >= index.size:
            break
        rows = rows[(ids == MISSING_ID).any(axis=1)]
        depth *= 2
    return result


def _keep(
    found: SearchResult,
    query_documents: HostArray,
    document: ShardedArray | HostArray,
    k: int,
) -> tuple[HostArray, HostArray]:
    """Drops missing and own-document hits, moves the rest forward, cuts to k."""
    owners = document[np.maximum(found.ids, 0)]
    drop = (found.ids == MISSING_ID) | (owners == query_documents[:, None])
    order = np.argsort(drop, axis=1, kind="stable")[:, :k]
    dropped = np.take_along_axis(drop, order, axis=1)
    ids = np.take_along_axis(found.ids, order, axis=1)
    scores = np.take_along_axis(found.scores, order, axis=1)
    return (
        np.where(dropped, MISSING_ID, ids),
        np.where(dropped, np.float32(-np.inf), scores),
    )
