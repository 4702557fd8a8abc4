"""Small RETRO models and inputs for tests: every parameter random, none at rest."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.parallel import axes
from realm_retro.retro.config import RetroConfig
from realm_retro.retro.model import Retro

# Small programs take longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Example(NamedTuple):
    """Inputs of `Retro.__call__` and targets, for a batch of sequences."""

    tokens: np.ndarray  # int32 [batch, n]
    segments: np.ndarray  # int32 [batch, n]
    neighbours: np.ndarray  # int32 [batch, l, k, r]
    neighbour_mask: np.ndarray  # bool [batch, l, k, r]
    targets: np.ndarray  # int32 [batch, n]
    loss_mask: np.ndarray  # bool [batch, n]


def small_config(**changes) -> RetroConfig:
    """No two sizes agree, so that a mixed-up axis cannot go unseen."""
    sizes = {
        "vocab_size": 37,
        "num_layers": 3,
        "model_dim": 12,
        "num_heads": 3,
        "head_dim": 6,  # 3 heads of 6 are not 12
        "ffw_dim": 20,
        "chunk_length": 4,
        "cca_layers": (2, 3),
        "encoder_layers": 2,
        "encoder_dim": 10,
        "encoder_num_heads": 2,
        "encoder_head_dim": 7,
        "encoder_ffw_dim": 15,
        "encoder_ca_layers": (1,),
        "compute_dtype": "float32",
    }
    return RetroConfig(**{**sizes, **changes})


@functools.cache
def random_params(config: RetroConfig, seed: int = 0) -> dict:
    """Parameters in which nothing is zero or one, so that a wrong use of one shows."""
    m, r = config.chunk_length, config.neighbour_length
    inputs = [jnp.zeros((1, m), int), None]
    if config.retrieves:
        inputs += [jnp.zeros((1, 1, 1, r), int), jnp.ones((1, 1, 1, r), bool)]
    shapes = axes.unbox(jax.eval_shape(Retro(config).init, jax.random.key(0), *inputs))
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(x + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def random_example(
    config: RetroConfig, *, batch: int = 2, chunks: int = 4, k: int = 2, seed: int = 1
) -> Example:
    """Neighbours that are whole, cut short, and missing; two documents in a row."""
    rng = np.random.default_rng(seed)
    m, r, vocab = config.chunk_length, config.neighbour_length, config.vocab_size
    n = chunks * m
    lengths = rng.integers(1, r + 1, (batch, chunks, k))
    lengths[:, 0, 0] = r
    lengths[:, 1, -1] = 0  # one neighbour is missing; in the last row all of a chunk's
    lengths[-1, 1] = 0
    border = rng.integers(m + 1, n - m, (batch, 1))  # not where a chunk ends
    return Example(
        tokens=rng.integers(vocab, size=(batch, n), dtype=np.int32),
        segments=(np.arange(n) >= border).astype(np.int32),
        neighbours=rng.integers(vocab, size=(batch, chunks, k, r), dtype=np.int32),
        neighbour_mask=np.arange(r) < lengths[..., None],
        targets=rng.integers(vocab, size=(batch, n), dtype=np.int32),
        loss_mask=rng.random((batch, n)) < 0.7,
    )
