"""Exact search over vectors that lie on all devices of a mesh, inside a jitted step.

Each device scores its own rows in blocks, keeps its best k, and the best of all devices
are merged. Vectors are an argument, never a constant of the program: another version of
an index takes their place without compiling anew (traps: 51 to 54).

Rows that only pad the last device score −inf, whatever the others score. Equal scores
go to the smaller row on any mesh: within a device `top_k` prefers the earlier row, and
devices hold rows in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from realm_retro.arrays import ShardedArray
from realm_retro.parallel import axes
from realm_retro.retrieval.index.base import MISSING_ID
from realm_retro.typing import Array, Float, HostArray, Int

# Rows that a device scores at once: bounds the memory of scores.
BLOCK_ROWS = 16_384

_AXES = axes.RULES["rows"]


def place(
    source: ShardedArray | HostArray, mesh: Mesh, *, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Rows of a host array over all devices, padded with zeros to equal shares.

    Each device's share is read by itself, so no host holds more than its own.

    Args:
      source: ``[N, …]``, in memory or memory-mapped.
      mesh: the devices.
      dtype: on the devices; bfloat16 halves the memory of an index.
    """
    placed = abstract(source.shape, mesh, dtype=dtype)
    shape = placed.shape

    def read(index: tuple[slice, ...] | None) -> HostArray:
        start, stop, _ = (index or (slice(None),))[0].indices(shape[0])
        rows = np.asarray(source[start : min(stop, len(source))])
        padding = [(0, stop - start - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        return np.pad(rows, padding).astype(dtype)

    return jax.make_array_from_callback(shape, placed.sharding, read)


def abstract(
    shape: Sequence[int], mesh: Mesh | AbstractMesh, *, dtype: jnp.dtype = jnp.float32
) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of what `place` makes of an array of `shape`."""
    share = -(-shape[0] // mesh.size)
    if share > BLOCK_ROWS:
        share = -(-share // BLOCK_ROWS) * BLOCK_ROWS
    sharding = NamedSharding(mesh, PartitionSpec(_AXES))
    return jax.ShapeDtypeStruct(
        (share * mesh.size, *shape[1:]), dtype, sharding=sharding
    )


def search(
    mesh: Mesh,
    vectors: Float[Array, "rows d"],
    size: int,
    queries: Float[Array, "queries d"],
    k: int,
    *,
    recall_target: float = 1.0,
) -> tuple[Int[Array, "queries k"], Float[Array, "queries k"]]:
    """The k rows with the largest inner products, best first. Traceable.

    Args:
      mesh: the devices that hold `vectors`.
      vectors: from `place`.
      size: how many rows are real.
      queries: of any sharding; all of them are needed by all devices.
      k: at most `size` are found.
      recall_target: below 1 each device finds its best approximately, which is the
        fast way on TPU; other devices search exactly all the same.

    Returns:
      Rows, int32, −1 where fewer than k exist, and scores, float32, −inf there.
    """
    local = functools.partial(
        _local_best,
        size=size,
        k=min(k, vectors.shape[0] // mesh.size),
        top_k=_top_k(recall_target, size),
    )

    def on_each(part: Array, queries: Array) -> tuple[Array, Array]:
        start = jax.lax.axis_index(_AXES) * part.shape[0]
        scores, rows = local(part, queries, start)
        # In the order of the devices, which is the order of the rows.
        scores = jax.lax.all_gather(scores, _AXES, axis=1, tiled=True)
        rows = jax.lax.all_gather(rows, _AXES, axis=1, tiled=True)
        best, place = jax.lax.top_k(scores, min(k, scores.shape[1]))
        return jnp.take_along_axis(rows, place, axis=1), best

    whole = PartitionSpec()
    rows, scores = jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(PartitionSpec(_AXES), whole),
        out_specs=(whole, whole),
        # After the gather all devices have the same, which is not inferred.
        check_vma=False,
    )(vectors, queries)
    missing = ((0, 0), (0, k - rows.shape[1]))
    rows = jnp.pad(
        jnp.where(jnp.isfinite(scores), rows, MISSING_ID),
        missing,
        constant_values=MISSING_ID,
    )
    return rows, jnp.pad(scores, missing, constant_values=-jnp.inf)


def _local_best(
    part: Array,
    queries: Array,
    start: Array,
    *,
    size: int,
    k: int,
    top_k: Callable[[Array, int], tuple[Array, Array]],
) -> tuple[Array, Array]:
    """Scores and global rows ``[queries, k]`` of one device's best."""
    rows = part.shape[0]
    block = min(rows, BLOCK_ROWS)

    def fold(best: tuple[Array, Array], number: Array):
        at = number * block
        vectors = jax.lax.dynamic_slice_in_dim(part, at, block)
        scores = jnp.einsum(
            "qd,nd->qn",
            queries.astype(part.dtype),
            vectors,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        ids = start + at + jnp.arange(block)
        scores = jnp.where(ids[None, :] < size, scores, -jnp.inf)
        found, place = top_k(scores, min(k, block))
        # The best so far stand in front: they have the smaller rows.
        scores = jnp.concatenate([best[0], found], axis=1)
        ids = jnp.concatenate([best[1], ids[place].astype(jnp.int32)], axis=1)
        scores, place = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(ids, place, axis=1)), None

    none = (
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
        jnp.full((len(queries), k), MISSING_ID, jnp.int32),
    )
    return jax.lax.scan(fold, none, jnp.arange(rows // block))[0]


def _top_k(
    recall_target: float, size: int
) -> Callable[[Array, int], tuple[Array, Array]]:
    if recall_target >= 1:
        return jax.lax.top_k
    # The target is of the whole index, of which a device sees a part.
    return functools.partial(
        jax.lax.approx_max_k,
        recall_target=recall_target,
        reduction_input_size_override=size,
    )
