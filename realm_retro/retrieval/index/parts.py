"""A ScaNN index in parts: neither building nor searching need hold all of it at once.

Each part is an index over some of the rows, in a folder of its own, tuned by itself.
The k best of the whole are among the k best of the parts, so results merge. The whole
is one artefact still: its manifest lists the files of all parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NoReturn

import numpy as np

from realm_retro.artifacts import MANIFEST, REQUEST, Manifest, Stage
from realm_retro.retrieval.index import base, tuning
from realm_retro.retrieval.index.base import Index, SearchResult
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.merge import merge
from realm_retro.typing import HostArray, JsonDict


@dataclasses.dataclass(frozen=True, eq=False)
class PartedIndex:
    """All parts in memory, searched one after the other.

    Attributes:
      parts: of one metric and width; their ids rise from part to part.
      ids: int64 ``[N]``, strictly increasing: those of all parts.
    """

    parts: tuple[Index, ...]
    ids: HostArray

    @classmethod
    def join(cls, parts: Iterable[Index]) -> PartedIndex:
        """Makes one index of parts whose ids follow each other."""
        parts = tuple(parts)
        ids = np.concatenate([part.ids for part in parts])
        return cls(parts, base.check_ids(ids, num_rows=len(ids)))

    @property
    def backend(self) -> str:
        """What searches a part."""
        return self.parts[0].backend

    @property
    def metric(self) -> base.Metric:
        """That of the parts."""
        return self.parts[0].metric

    @property
    def size(self) -> int:
        """N, of all parts."""
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.parts[0].dim

    def search(self, queries: HostArray, k: int) -> SearchResult:
        """About the k best of ``queries [q, d]``."""
        return merge([part.search(queries, k) for part in self.parts], k)

    def describe(self) -> JsonDict:
        """The parameters of each part."""
        return {"parts": [part.describe() for part in self.parts]}

    def save(self, stage: Stage) -> NoReturn:
        """Refuses: each part is saved by itself when it is built."""
        raise NotImplementedError("save each part by itself and `adopt` its folder")


def split(ids: HostArray, rows: int) -> list[HostArray]:
    """Cuts sorted ids ``[N]`` into the fewest parts of at most `rows`, about equal."""
    return np.array_split(ids, max(1, -(-len(ids) // rows)))


def name(number: int) -> str:
    """The folder of a part, within the whole's."""
    return f"part-{number:05d}"


def adopt(stage: Stage, part: Manifest) -> None:
    """Records the files of a finished part in the whole's stage."""
    folder = part.directory.name
    for file, record in part.files.items():
        stage.adopt(f"{folder}/{file}", checksum=record["sha256"])
    for file in (REQUEST, MANIFEST):
        stage.adopt(f"{folder}/{file}")


def recall(
    number: int,
    read: Callable[[int], tuple[Index, ExactIndex]],
    queries: HostArray,
    own_ids: HostArray,
    k: int,
) -> float:
    """Recall@k of the whole; see `tuning`.

    Args:
      number: of parts.
      read: the number of a part → it and the exact index of its rows.
      queries: float32 ``[q, d]``.
      own_ids: int64 ``[q]``, see `tuning.Trial`.
      k: neighbours looked for.
    """
    nothing = SearchResult.missing(len(queries), k)
    truth, found = nothing, nothing
    for i in range(number):
        index, exact = read(i)
        truth, found = (
            merge([so_far, tuning.best_others(of, exact, queries, own_ids, k)], k)
            for so_far, of in ((truth, exact), (found, index))
        )
        del index, exact  # There is room for one part, not for the next beside it.
    return tuning.share_found(truth, found)
