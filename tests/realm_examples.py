"""Small REALMs and batches for tests: every parameter random, none at rest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.parallel import axes
from realm_retro.realm import model
from realm_retro.realm.config import RealmConfig

# Small programs take longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

ALL_PARTS = (*model.PRETRAINING, "reader")


def small_realm(**changes) -> RealmConfig:
    """No two sizes agree, so that a mixed-up axis cannot go unseen."""
    sizes = {
        "vocab_size": 111,
        "width": 16,
        "num_layers": 2,
        "num_heads": 4,
        "hidden": 24,
        "title_length": 3,
        "body_length": 7,
        "max_positions": 20,
        "embed_dim": 9,
        "candidates": 4,
        "query_length": 8,
        "max_masks": 5,
        "span_width": 4,
        "span_hidden": 10,
    }
    return RealmConfig(**{**sizes, **changes})


@functools.cache
def random_realm(config: RealmConfig, parts=ALL_PARTS, seed: int = 0) -> dict:
    """Parameters in which nothing is zero or one, so that a wrong use of one shows."""
    boxed = jax.eval_shape(lambda: model.init(config, jax.random.key(0), parts))
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = 0.4 * rng.normal(size=leaf.shape)
        return jnp.asarray(x + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, axes.unbox(boxed))


def random_batch(
    config: RealmConfig, *, rows: int = 3, k: int | None = None, seed: int = 1
) -> dict[str, np.ndarray]:
    """A pre-training batch: padding everywhere, rubbish behind every length."""
    rng = np.random.default_rng(seed)
    k, masks = k or config.candidates, config.max_masks
    q, t, n = config.query_length, config.title_length, config.body_length

    def pieces(*shape: int) -> np.ndarray:
        return rng.integers(104, config.vocab_size, shape).astype(np.int32)

    query_len = rng.integers(2, q + 1, rows)
    query_len[0] = q
    wanted = rng.integers(1, np.minimum(query_len, masks) + 1)
    positions = np.full((rows, masks), 10_000, np.int32)
    for row, count in enumerate(wanted):
        positions[row, :count] = np.sort(rng.permutation(query_len[row])[:count])
    title_len = rng.integers(0, t + 1, (rows, k))
    body_len = rng.integers(1, n + 1, (rows, k))
    title_len[:, 0] = body_len[:, 0] = 0
    valid = np.ones((rows, k), bool)
    if k > 2:
        body_len[0, 1] = n
        valid[-1, -1] = False
    return {
        "query": pieces(rows, q),
        "query_len": query_len.astype(np.int32),
        "mask_positions": positions,
        "targets": pieces(rows, masks),
        "target_mask": np.arange(masks)[None, :] < wanted[:, None],
        "title": pieces(rows, k, t),
        "title_len": title_len.astype(np.int32),
        "body": pieces(rows, k, n),
        "body_len": body_len.astype(np.int32),
        "valid": valid,
    }
