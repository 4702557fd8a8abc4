"""Choosing the next token: temperature, top-k and top-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from realm_retro.typing import Array, Float, Int

_NEVER = -1e30


def sample(
    logits: Float[Array, "batch vocab"],
    keys: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int[Array, " batch"]:
    """One token a row.

    Args:
      logits: of the next token.
      keys: a random key a row, so that a row does not depend on its neighbours in
        the batch.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: only the k most probable tokens; 0 is all of them.
      top_p: only the most probable tokens that together reach this probability,
        always at least one; 1 is all of them.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    rank = jnp.arange(logits.shape[-1])[None, :]
    if top_k:
        ranked = jnp.where(rank < top_k, ranked, _NEVER)
    if top_p < 1:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where((before < top_p) | (rank == 0), ranked, _NEVER)
    place = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
