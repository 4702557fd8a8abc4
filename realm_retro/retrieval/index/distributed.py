"""An index whose rows lie on several hosts: each searches its own, results merge.

What a host holds is an index by itself, of any backend. A search is a collective: all
processes of the program (`parallel.hosts.initialise`) ask the same queries in the same
order, and all get the same answer. Vectors never travel, only the best of each part do.

With exact parts the answer is that of one exact index, equal scores in the order of
ids, however the rows are spread.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import jax
import numpy as np

from realm_retro.artifacts import Stage, fingerprint_of
from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.retrieval.index import base
from realm_retro.retrieval.index.base import Index, SearchResult
from realm_retro.retrieval.index.exact import BLOCK_ROWS, ExactIndex
from realm_retro.retrieval.merge import merge
from realm_retro.typing import HostArray, JsonDict

# id and score of a hit, as they travel.
_HIT = np.dtype([("id", np.int64), ("score", np.float32)])


@dataclasses.dataclass(frozen=True, eq=False)
class DistributedIndex:
    """One process's view of an index that all of them hold together.

    Attributes:
      part: the rows of this process.
      ids: int64 ``[N]``, strictly increasing: those of all processes.
    """

    part: Index
    ids: HostArray

    @classmethod
    def join(cls, part: Index) -> DistributedIndex:
        """Makes one index of the parts of all processes, which all call this.

        Args:
          part: this process's, with ids that no other has; it may be empty.

        Raises:
          UserError: parts differ in metric or width, or share an id.
        """
        found = hosts.gather(
            np.asarray([base.METRICS.index(part.metric), part.dim, part.size], np.int64)
        )
        if (found[:, :2] != found[0, :2]).any():
            kinds = [f"{base.METRICS[m]} of {d} numbers" for m, d, _ in found]
            raise UserError(
                f"the processes hold different indexes: {', '.join(kinds)}; start all"
                " with the same --config and --workdir"
            )
        padded = np.full(found[:, 2].max(), base.MISSING_ID, np.int64)
        padded[: part.size] = part.ids
        ids = np.sort(hosts.gather(padded), axis=None)
        ids = ids[ids != base.MISSING_ID]
        if (np.diff(ids) == 0).any():
            twice = ids[1:][np.diff(ids) == 0][0]
            raise UserError(
                f"two processes hold id {twice} of the index; their rows must differ"
            )
        return cls(part, ids)

    @property
    def backend(self) -> str:
        """What searches a part."""
        return self.part.backend

    @property
    def metric(self) -> base.Metric:
        """That of the parts."""
        return self.part.metric

    @property
    def size(self) -> int:
        """N, on all processes."""
        return len(self.ids)

    @property
    def dim(self) -> int:
        """The width of a vector."""
        return self.part.dim

    def search(self, queries: HostArray, k: int) -> SearchResult:
        """The k best of all parts; a collective.

        Args:
          queries: float ``[q, dim]``, the same on every process.
          k: how many, the same on every process.
        """
        mine = self.part.search(queries, k)
        hits = np.empty(mine.ids.shape, _HIT)
        hits["id"], hits["score"] = mine.ids, mine.scores
        found = hosts.gather(hits)
        return merge(
            [SearchResult(ids=hit["id"], scores=hit["score"]) for hit in found], k
        )

    def describe(self) -> JsonDict:
        """The parameters of this process's part."""
        return self.part.describe()

    def save(self, stage: Stage) -> NoReturn:
        """Refuses: parts are cut from an index on disk."""
        raise NotImplementedError("save the index that the parts were cut from")


def take_part(index: Index) -> DistributedIndex:
    """Keeps this process's share of an index that every process can read.

    Only the share is read from the disk. All processes call this.

    Raises:
      UserError: the index cannot be cut, or is not the same everywhere.
    """
    if not isinstance(index, ExactIndex):
        raise UserError(
            f"an index of the backend {index.backend} is searched whole and cannot be"
            " spread over processes; build it with --config.index.backend=exact"
        )
    mine = rows_of(index.size, jax.process_index(), jax.process_count())
    return DistributedIndex.join(
        dataclasses.replace(
            index, vectors=index.vectors[mine], ids=index.ids[mine], _resident={}
        )
    )


def rows_of(
    size: int, process: int, processes: int, *, block_rows: int = BLOCK_ROWS
) -> slice:
    """The rows of `size` that one of `processes` holds.

    Shares are whole blocks, where there are enough of them: then each is scored in the
    shape that it has in one index, and rounds like it.
    """
    unit = block_rows if size >= block_rows * processes else 1
    units = -(-size // unit)
    start, stop = (units * i // processes * unit for i in (process, process + 1))
    return slice(min(start, size), min(stop, size))


def check_same(what: str, fingerprint: str) -> None:
    """Compares a fingerprint over all processes, which all call this.

    Raises:
      UserError: a process has another.
    """
    digest = np.frombuffer(bytes.fromhex(fingerprint_of(fingerprint)), np.uint8)
    if (hosts.gather(digest) != digest).any():
        raise UserError(
            f"{what}: the processes read different ones; --workdir must be the same"
            " folder on every host"
        )
