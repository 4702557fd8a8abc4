"""The inverse cloze task (Lee et al. 2019, section 4): a warm start for both towers.

A sentence of a passage plays the query, and the rest of the passage is the document to
be found among those of the whole batch. In one example of ten the sentence stays in
the passage, so that the towers learn to match words too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.parallel import axes
from realm_retro.realm import model, packing
from realm_retro.realm.config import RealmConfig
from realm_retro.train.recipe import Mean
from realm_retro.typing import Array, Batch, Bool, Float, HostArray, Int, Params

BATCH_SPEC = {
    "query": ("batch", "length"),
    "query_len": ("batch",),
    "title": ("batch", "length"),
    "title_len": ("batch",),
    "body": ("batch", "length"),
    "body_len": ("batch",),
    "passage": ("batch",),
    "removed": ("batch",),
}


@dataclasses.dataclass(frozen=True)
class IctExamples:
    """Queries out of passages, and the passages without them.

    Attributes:
      query: int32 [rows, query_length], a sentence; 0 behind its length.
      query_len: int32 [rows], of which a whole sentence may have had more.
      body: int32 [rows, body_length], the passage; 0 behind its length.
      body_len: int32 [rows].
      removed: bool [rows], whether the sentence was taken out of the passage.
      usable: bool [rows]; False where the passage has no sentence, or only one and
        it was to be removed. Set ``passage`` to −1 there.
      truncated: int32 [rows], tokens that a sentence lost to `query_length`.
    """

    query: HostArray
    query_len: HostArray
    body: HostArray
    body_len: HostArray
    removed: HostArray
    usable: HostArray
    truncated: HostArray


def ict_examples(
    bodies: HostArray,
    lengths: HostArray,
    sentences: Sequence[HostArray],
    rng: np.random.Generator,
    *,
    query_length: int,
    mask_rate: float = 0.9,
) -> IctExamples:
    """Takes one sentence of each passage for a query.

    Args:
      bodies: int [rows, body_length], wordpieces of passages.
      lengths: int [rows], how many are real.
      sentences: for each passage int [sentences, 2], [start, end) in its wordpieces.
      rng: two numbers of it are used for each row.
      query_length: longer sentences are cut to it, and the loss is counted.
      mask_rate: how often the sentence is removed from the passage.
    """
    rows, width = bodies.shape
    # Drawn for all rows before any is looked at: a row does not shift the next one's.
    draws = rng.random((rows, 2))
    query = np.zeros((rows, query_length), np.int32)
    body = np.where(np.arange(width)[None] < lengths[:, None], bodies, 0)
    body, body_len = body.astype(np.int32), np.asarray(lengths, np.int32).copy()
    query_len, truncated = np.zeros((2, rows), np.int32)
    removed, usable = np.zeros((2, rows), bool)
    for row, (which, remove) in enumerate(draws):
        found = sentences[row]
        removed[row] = remove < mask_rate
        usable[row] = len(found) > (1 if removed[row] else 0)
        if not usable[row]:
            continue
        start, end = found[int(which * len(found))]
        kept = min(end - start, query_length)
        query[row, :kept] = bodies[row, start : start + kept]
        query_len[row], truncated[row] = kept, end - start - kept
        if removed[row]:
            rest = np.delete(body[row], np.s_[start:end])
            body[row] = np.pad(rest, (0, end - start))
            body_len[row] -= end - start
    removed &= usable
    return IctExamples(query, query_len, body, body_len, removed, usable, truncated)


def ict_loss(
    config: RealmConfig, params: Params, batch: Batch, key: Array | None
) -> tuple[Array, Array, dict[str, Mean]]:
    """Cross-entropy of each query's own passage among those of the batch.

    The softmax runs over the batch as it is given, on all devices: with accumulated
    gradients that is one piece of it, so give the warm start none.

    Args:
      config: the model's.
      params: the parts `model.TOWERS`.
      batch: integer arrays, wordpieces without special tokens and their lengths:
        ``query`` [b, q], ``query_len``, ``title`` [b, t], ``title_len``, ``body``
        [b, n], ``body_len`` [b]; ``passage`` [b], equal numbers for the same passage,
        negative for a row that is not there; ``removed`` [b] of `IctExamples`.
      key: for dropout; None for none.

    Returns:
      (sum in nats, weight, metrics): ``accuracy``, and the same of queries removed
      from their passage, ``accuracy_removed``.
    """
    keys = [None] * 2 if key is None else list(jax.random.split(key))
    ids, mask = packing.query_inputs(batch["query"], batch["query_len"])
    queries = model.embed_queries(config, params, ids, mask, keys[0])
    parts = (batch[name] for name in ("title", "title_len", "body", "body_len"))
    documents = model.embed_documents(
        config, params, *packing.document_inputs(*parts), keys[1]
    )
    # Every device scores its queries against the passages of all.
    documents = axes.constrain(documents, (None, "embed_act"))
    return in_batch_loss(
        queries, documents, batch["passage"], batch["removed"], config.score_scale
    )


def in_batch_loss(
    queries: Float[Array, "batch d"],
    documents: Float[Array, "batch d"],
    passage: Int[Array, " batch"],
    removed: Bool[Array, " batch"],
    scale: float = 1.0,
) -> tuple[Array, Array, dict[str, Mean]]:
    """`ict_loss` from vectors; row i of `documents` is the passage of query i."""
    scores = scale * jnp.einsum(
        "id,jd->ij",
        queries.astype(jnp.float32),
        documents.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    there = passage >= 0
    own = jnp.eye(len(passage), dtype=bool)
    # The same passage in another row is no wrong answer: it is left out.
    negative = (passage[:, None] != passage[None, :]) & there[None, :]
    scores = jnp.where(own | negative, scores, -1e30)
    each = jax.nn.logsumexp(scores, axis=-1) - jnp.diagonal(scores)
    weight = there.astype(jnp.float32)
    right = weight * (jnp.argmax(scores, axis=-1) == jnp.arange(len(passage)))
    taken = weight * removed
    return (
        jnp.sum(each * weight),
        jnp.sum(weight),
        {
            "accuracy": (jnp.sum(right), jnp.sum(weight)),
            "accuracy_removed": (jnp.sum(right * removed), jnp.sum(taken)),
        },
    )
