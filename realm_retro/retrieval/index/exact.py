"""Exact search in JAX: the ground truth, and the backend where ScaNN does not run.

A query's score for a row is ``scale · (q · x) + bias``: scale 2 and bias −‖x‖² for the
squared distance (up to −‖q‖², the same for every row and added at the end), scale 1
and bias 0 for the inner product. Rows that only pad the last block have bias −inf, so
they lose to any real row, whatever its score.

Vectors are scored in blocks of equal shape, and each block's best are folded into the
best so far: memory on the device stays flat however many rows there are. Only a
bounded number of blocks stays on the device; the rest is sent again for each batch.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.arrays import open_npy, release, write_npy
from realm_retro.artifacts import Manifest, Stage
from realm_retro.retrieval.index import base
from realm_retro.typing import Array, HostArray, JsonDict

BLOCK_ROWS = 16_384
MAX_QUERIES = 512
RESIDENT_BYTES = 1 << 30

_VECTORS = "vectors.npy"
_IDS = "ids.npy"


@dataclasses.dataclass(frozen=True, eq=False)
class ExactIndex:
    """Compares each query with every vector; ties go to the smaller id.

    Attributes:
      vectors: float32 ``[N, d]``, in memory or memory-mapped.
      ids: int64 ``[N]``, strictly increasing.
      metric: ``squared_l2`` or ``dot_product``.
      block_rows: rows scored at once; scores take ``512 × block_rows × 4`` bytes.
    """

    vectors: HostArray
    ids: HostArray
    metric: base.Metric
    block_rows: int = BLOCK_ROWS
    backend: str = "exact"
    _resident: dict[int, tuple[Array, Array]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    @classmethod
    def build(
        cls,
        vectors: HostArray,
        ids: HostArray,
        *,
        metric: base.Metric,
        block_rows: int = BLOCK_ROWS,
    ) -> ExactIndex:
        """An index over ``vectors [N, d]`` of any float dtype.

        Raises:
          UserError: a vector is not finite.
          ValueError: the ids are not strictly increasing, one per row.
        """
        ids = base.check_ids(ids, num_rows=len(vectors))
        return cls(base.check_vectors(vectors, ids), ids, metric, block_rows)

    @classmethod
    def load(cls, manifest: Manifest) -> ExactIndex:
        """Memory-maps what `save` wrote."""
        vectors = open_npy(manifest.path(_VECTORS))
        ids = open_npy(manifest.path(_IDS))
        return cls(vectors, ids, manifest.meta["metric"])

    def save(self, stage: Stage) -> None:
        """Writes the vectors and ids."""
        for name, array in ((_VECTORS, self.vectors), (_IDS, self.ids)):
            with stage.write(name) as path:
                write_npy(path, array)

    def describe(self) -> JsonDict:
        """Nothing to tune."""
        return {}

    @property
    def size(self) -> int:
        """N."""
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.vectors.shape[1]

    def search(self, queries: HostArray, k: int) -> base.SearchResult:
        """The exact k best of ``queries [q, d]``.

        Shapes on the device come from a few buckets of q and k, so that calls of
        varying size reuse a few compiled programs.

        Raises:
          UserError: a query is not finite.
        """
        queries = base.check_queries(queries, dim=self.dim, k=k)
        result = base.SearchResult.missing(len(queries), k)
        found = min(k, self.size)
        for start in range(0, len(queries) if found else 0, MAX_QUERIES):
            batch = queries[start : start + MAX_QUERIES]
            scores, rows = self._best(batch, _bucket(found))
            part = slice(start, start + len(batch))
            result.ids[part, :found] = self.ids[rows[:, :found]]
            result.scores[part, :found] = scores[:, :found]
        return result

    def _best(self, queries: HostArray, k: int) -> tuple[HostArray, HostArray]:
        """Scores and rows ``[q, k]`` of one batch; past N rows they are padding."""
        padded = np.zeros((_bucket(len(queries)), self.dim), np.float32)
        padded[: len(queries)] = queries
        on_device = jnp.asarray(padded)
        best: tuple[Array, Array] = (
            jnp.full((len(padded), k), base.MISSING_SCORE, jnp.float32),
            jnp.zeros((len(padded), k), jnp.int32),
        )
        scale = np.float32(2 if self.metric == "squared_l2" else 1)
        for number, start in enumerate(range(0, self.size, self._block_rows)):
            block, bias = self._block(number)
            best = _fold(*best, on_device, block, bias, scale, np.int32(start), k=k)
        scores, rows = (np.asarray(part)[: len(queries)] for part in best)
        if self.metric == "squared_l2":
            # Rounding may leave a vector's distance to itself a little below zero.
            scores = np.minimum(scores - base.squared_norms(queries)[:, None], 0.0)
        return scores, rows

    @property
    def _block_rows(self) -> int:
        # A small index is one block of its own size, up to a bucket.
        return min(self.block_rows, _bucket(self.size))

    def _block(self, number: int) -> tuple[Array, Array]:
        block = self._resident.get(number) or self._load_block(number)
        if (number + 1) * self._block_rows * self.dim * 4 <= RESIDENT_BYTES:
            self._resident[number] = block
        return block

    def _load_block(self, number: int) -> tuple[Array, Array]:
        rows = self._block_rows
        vectors = self.vectors[number * rows : (number + 1) * rows]
        block = np.zeros((rows, self.dim), np.float32)
        block[: len(vectors)] = vectors
        release(self.vectors)
        bias = np.full(rows, -np.inf, np.float32)
        bias[: len(vectors)] = 0.0
        if self.metric == "squared_l2":
            bias -= base.squared_norms(block)
        return jnp.asarray(block), jnp.asarray(bias)


@functools.partial(jax.jit, static_argnames="k")
def _fold(
    best_scores: Array,
    best_rows: Array,
    queries: Array,
    block: Array,
    bias: Array,
    scale: Array,
    start: Array,
    *,
    k: int,
) -> tuple[Array, Array]:
    """Folds one block ``[b, d]`` into the best so far ``[q, k]``.

    `jax.lax.top_k` puts the lower position first among equals. Blocks come in row
    order and the best so far stand in front of the new, so the smaller row wins a tie.
    """
    products = jnp.einsum(
        "qd,bd->qb", queries, block, precision=jax.lax.Precision.HIGHEST
    )
    scores = scale * products + bias[None, :]
    scores, rows = jax.lax.top_k(scores, min(k, block.shape[0]))
    scores = jnp.concatenate([best_scores, scores], axis=1)
    rows = jnp.concatenate([best_rows, rows.astype(jnp.int32) + start], axis=1)
    scores, positions = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(rows, positions, axis=1)


def _bucket(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()
