"""The k nearest chunks of every chunk, none of its own document (section 2.2).

Kind ``neighbours``: row i holds the neighbours of chunk i, best first, −1 where fewer
were found. Files: ``ids-00000-of-00003.npy`` int64 [rows, k] and
``scores-00000-of-00003.npy`` float32 [rows, k], memory-mapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from realm_retro import artifacts
from realm_retro.arrays import ShardedArray
from realm_retro.retrieval.index.base import MISSING_ID, Index, SearchResult
from realm_retro.shards import Shard
from realm_retro.typing import HostArray

KIND = "neighbours"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.find_neighbours"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)

# Hits of one search, before they are filtered: bounds its memory where many rows have
# to look deep.
_MAX_HITS = 1 << 22
# Ids that are counted at a time.
_COUNTED = 1 << 22


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
        manifest = load_manifest(directory, parents=parents, verify=verify)
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


def open_stage(
    directory: epath.PathLike,
    *,
    config: NeighboursConfig,
    parents: Mapping[str, str],
    join: bool = False,
) -> artifacts.Stage:
    """Opens the stage for writing or resuming, to be shared.

    The batch size is no part of it.
    """
    return artifacts.Stage.open(
        directory,
        kind=KIND,
        format_version=FORMAT_VERSION,
        config={
            "k": config.k,
            "margin": config.margin,
            "shard_size": config.shard_size,
        },
        parents=parents,
        made_by=MADE_BY,
        join=join,
    )


def shards(num_rows: int, shard_size: int) -> list[Shard]:
    """The shards of a table of `num_rows`, in order: a file of ids, one of scores."""
    starts = range(0, num_rows, shard_size)
    return [
        Shard(
            start,
            min(start + shard_size, num_rows),
            tuple(shard_name(part, i, len(starts)) for part in ("ids", "scores")),
        )
        for i, start in enumerate(starts)
    ]


def shard_name(part: str, shard: int, num_shards: int) -> str:
    """File name of the ids or scores of one shard."""
    return f"{part}-{shard:05d}-of-{num_shards:05d}.npy"


@dataclasses.dataclass(frozen=True, eq=False)
class Filter:
    """Finds neighbours that are not of the query's own document.

    Attributes:
      index: its ids are chunk ids.
      document: int [N], row of each chunk's document.
      indexed: int [documents], how many chunks of each document the index holds.
    """

    index: Index
    document: HostArray
    indexed: HostArray

    @classmethod
    def make(cls, index: Index, document: HostArray) -> Filter:
        """Counts the chunks of each document in the index."""
        num_documents = int(document.max(initial=-1)) + 1
        indexed = np.zeros(num_documents, np.int64)
        # Some at a time: copies of all ids would hold more than the table itself.
        for start in range(0, index.size, _COUNTED):
            ids = index.ids[start : start + _COUNTED]
            indexed += np.bincount(document[ids], minlength=num_documents)
        return cls(index, document, indexed)

    def find(
        self, queries: HostArray, own_documents: HostArray, *, k: int, margin: int
    ) -> SearchResult:
        """The k best of each query that are not of its own document.

        More than k are searched, filtered, and only then cut to k: a chunk is not
        always its own nearest, and its document may fill the whole front. Rows left
        short are searched again, twice as deep each time, until they are full or
        nothing more is there.

        Args:
          queries: float [q, d].
          own_documents: int [q], row of the document that each query is of; −1 for a
            query that is of none.
          k: how many to keep.
          margin: how many more to ask for at first.
        """
        own = np.where(own_documents >= 0, self.indexed[own_documents], 0)
        wanted = np.minimum(k, self.index.size - own)
        result = SearchResult.missing(len(queries), k)
        depth = k + margin
        rows = np.flatnonzero(wanted > 0)
        while len(rows):
            depth = min(depth, self.index.size)
            for part in np.array_split(rows, -(-len(rows) * depth // _MAX_HITS)):
                found = self.index.search(queries[part], depth)
                others = self.document[found.ids] != own_documents[part][:, None]
                kept = found.only(others, k)
                result.ids[part], result.scores[part] = kept.ids, kept.scores
            short = (result.ids[rows] != MISSING_ID).sum(axis=1) < wanted[rows]
            rows = rows[short] if depth < self.index.size else rows[:0]
            depth *= 2
        return result


class Finder:
    """Searches an index part by part, of which one at a time is in memory.

    Attributes:
      document: int [N], row of each chunk's document.
      num_parts: of the index.
    """

    def __init__(self, parts: Sequence[Callable[[], Index]], document: HostArray):
        """Opens the first part.

        Args:
          parts: each reads one part of the index.
          document: int [N], row of each chunk's document.

        Raises:
          UserError: the part cannot be read.
        """
        self.document = document
        self.num_parts = len(parts)
        self._parts = parts
        self._number, self._filter = 0, Filter.make(parts[0](), document)

    def find(
        self, part: int, queries: HostArray, own: HostArray, *, k: int, margin: int
    ) -> SearchResult:
        """The k best of one part, see `Filter.find`; `merge` joins those of all."""
        if part != self._number:
            del self._filter  # There is room for one part, not for the next beside it.
            self._filter = Filter.make(self._parts[part](), self.document)
            self._number = part
        return self._filter.find(queries, own, k=k, margin=margin)
