"""Losses as (sum, weight) pairs, so that any batching gives the same mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from realm_retro.typing import Array, Float, Int


@jax.custom_vjp
def token_losses(
    logits: Float[Array, "*axes vocab"], targets: Int[Array, "*axes"]
) -> Float[Array, "*axes"]:
    """Cross-entropy of each token in nats, computed in float32.

    The logits of a batch are the largest array of a training, and in float32 they would
    be twice as large: what is kept for the backward pass is in the dtype that they came
    in, and so is their gradient, which JAX's own rule would scatter into float32.

    Args:
      logits: unnormalised, any float dtype.
      targets: ids in [0, vocab).
    """
    return _token_losses(logits, targets)[0]


def _token_losses(logits: Array, targets: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(wide, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return total - chosen.astype(jnp.float32), (logits, targets, total)


def _token_losses_backward(
    saved: tuple[Array, ...], slope: Array
) -> tuple[Array, None]:
    logits, targets, total = saved
    share = jnp.exp(logits.astype(jnp.float32) - total[..., None])
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target = (ids == targets[..., None]).astype(jnp.float32)
    return (slope[..., None] * (share - target)).astype(logits.dtype), None


token_losses.defvjp(_token_losses, _token_losses_backward)


def cross_entropy(
    logits: Float[Array, "*axes vocab"],
    targets: Int[Array, "*axes"],
    mask: Array,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy and the number of tokens it is summed over.

    The caller divides, once, after the sums of all microbatches and devices are
    added; a mean of means would weigh tokens of padded sequences more.

    Args:
      logits: unnormalised, any float dtype.
      targets: ids; anything where `mask` is 0.
      mask: bool, or a float weight for each target.

    Returns:
      (sum in nats, weight), float32 scalars.
    """
    weights = mask.astype(jnp.float32)
    # Masked targets may be any number, −1 too: they must not gather out of bounds,
    # whose NaN would survive the multiplication by 0.
    losses = token_losses(logits, jnp.where(weights > 0, targets, 0))
    return jnp.sum(losses * weights), jnp.sum(weights)
