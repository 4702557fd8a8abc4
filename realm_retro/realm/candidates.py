"""From what a search found to the k candidates of an example.

Removed before the cut to k − 1 (the null document is the k-th): passages of the
query's own document, which hold the masked words, and passages that hold the query
itself although they are of another document: copies, quotations, older versions.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from realm_retro.data.passages import PassageStore
from realm_retro.realm.config import RealmConfig
from realm_retro.retrieval.index.base import MISSING_ID
from realm_retro.typing import HostArray

# Wordpieces of a shingle. Shorter ones are shared by texts that are not copies.
_SHINGLE = 5


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Candidates of a batch.

    Attributes:
      ids: int64 [b, wanted], passages, best first; −1 where too few were left.
      own: int32 [b], hits that were of the query's own document.
      copies: int32 [b], hits that held the query and were of another.
    """

    ids: HostArray
    own: HostArray
    copies: HostArray


def choose(
    hits: HostArray,
    store: PassageStore,
    *,
    rows: HostArray,
    queries: HostArray,
    lengths: HostArray,
    wanted: int,
    copied: float,
) -> Chosen:
    """The first `wanted` hits of each query that do not give the answer away.

    Args:
      hits: int64 [b, n], passages, best first; −1 for none; none twice.
      store: the passages.
      rows: int64 [b], the passage that each query comes from.
      queries: int [b, q], wordpieces before masking.
      lengths: int [b], how many are real.
      wanted: how many to keep.
      copied: a passage that holds at least this share of the query's runs of five
        wordpieces is a copy; above 1 keeps all.
    """
    own_document = store.document[rows]
    there = hits != MISSING_ID
    document = store.document[np.where(there, hits, 0)]
    own = there & (document == own_document[:, None])
    possible = there & ~own
    chosen = np.full((len(hits), wanted), MISSING_ID, np.int64)
    copies = np.zeros(len(hits), np.int32)
    for i, (row, keep) in enumerate(zip(hits, possible, strict=True)):
        shingles = _shingles(queries[i][: lengths[i]])
        kept = 0
        for passage in row[keep]:
            if kept == wanted:
                break
            body = store.body[int(passage)][: store.lengths[int(passage)]]
            if shingles and _share(shingles, body) >= copied:
                copies[i] += 1
                continue
            chosen[i, kept] = passage
            kept += 1
    return Chosen(chosen, own.sum(1).astype(np.int32), copies)


def assemble(
    ids: HostArray, store: PassageStore, config: RealmConfig
) -> dict[str, HostArray]:
    """Candidates as `objective.pretrain_loss` takes them; the first is the null one.

    Args:
      ids: int64 [b, k − 1]; −1 for none.
      store: the passages.
      config: the model's; its lengths are at least the store's.

    Returns:
      ``title`` [b, k, t], ``title_len``, ``body`` [b, k, n], ``body_len``, ``valid``
      [b, k]; int32, and bool for the last.
    """
    there = ids != MISSING_ID
    rows = np.where(there, ids, 0).reshape(-1)
    title, title_length = store.title_tokens(rows)
    body, body_length = store.body[rows], store.lengths[rows]

    def with_null(x: HostArray, width: int | None = None) -> HostArray:
        x = x.reshape(*ids.shape, *x.shape[1:])
        x = np.where(there.reshape(*ids.shape, *[1] * (x.ndim - 2)), x, 0)
        pad = [(0, 0), (1, 0)]
        if width is not None:
            pad.append((0, width - x.shape[2]))
        return np.pad(x.astype(np.int32), pad)

    return {
        "title": with_null(title, config.title_length),
        "title_len": with_null(title_length),
        "body": with_null(body, config.body_length),
        "body_len": with_null(body_length),
        "valid": np.pad(there, [(0, 0), (1, 0)], constant_values=True),
    }


def _shingles(ids: HostArray) -> set[bytes]:
    return set(_runs(ids))


def _share(shingles: set[bytes], body: HostArray) -> float:
    return len(shingles.intersection(_runs(body))) / len(shingles)


def _runs(ids: HostArray) -> list[bytes]:
    raw = np.ascontiguousarray(ids, np.int32).tobytes()
    return [raw[i : i + 4 * _SHINGLE] for i in range(0, len(raw) - 4 * _SHINGLE + 1, 4)]
