"""A step that goes wrong is found on the device, and its update is left out.

Wrong is a loss or a gradient that is not finite, or a loss far above those before it.
The step finds out by itself and keeps the weights and the optimiser's state as they
were: one program, whatever becomes of it, and nothing for the host to wait for. The
host hears of it when it looks back at the step's metrics; see `bad_steps`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.typing import Array, JsonDict, PyTree

# The running mean of the losses: each step weighs a hundredth, or in the beginning as
# much as all others. A loss is compared with it once it holds ten.
_WINDOW = 100
_KNOWN_AFTER = 10
# Nats. A model that is nearly always right may be wrong once without having exploded.
_LEAST_MEAN = 1.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean_loss", "counted", "skipped", "in_a_row"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Health:
    """What the device remembers of the steps before; scalars.

    Attributes:
      mean_loss: float32, running mean of the loss of good steps.
      counted: int32, good steps in it: those that had any target.
      skipped: int32, steps whose update was left out.
      in_a_row: int32, how many of them since the last good step.
    """

    mean_loss: PyTree
    counted: PyTree
    skipped: PyTree
    in_a_row: PyTree


def fresh() -> Health:
    """Before the first step; host scalars."""
    return Health(np.float32(0), np.int32(0), np.int32(0), np.int32(0))


def judge(
    health: Health,
    loss: tuple[Array, Array],
    grad_norm: Array,
    *,
    max_loss_ratio: float,
) -> tuple[Health, Array]:
    """Says whether a step is good, that is ``in_a_row == 0`` after it. Traced.

    Args:
      health: before the step.
      loss: summed loss and its weight, float32 scalars.
      grad_norm: of all gradients together.
      max_loss_ratio: how many times the mean a loss may be; 0: any.

    Returns:
      The health after the step, and the loss above which it would have been bad.
    """
    total, weight = loss
    there = weight > 0
    mean = jnp.where(there, total / jnp.where(there, weight, 1), total)
    limit = jnp.float32(jnp.inf)
    if max_loss_ratio:
        usual = max_loss_ratio * jnp.maximum(health.mean_loss, _LEAST_MEAN)
        limit = jnp.where(health.counted >= _KNOWN_AFTER, usual, limit)
    finite = jnp.isfinite(mean) & jnp.isfinite(weight) & jnp.isfinite(grad_norm)
    good = finite & (mean <= limit)
    counts = good & there
    share = 1 / jnp.minimum(health.counted + 1, _WINDOW).astype(jnp.float32)
    moved = health.mean_loss + share * (mean - health.mean_loss)
    return Health(
        mean_loss=jnp.where(counts, moved, health.mean_loss),
        counted=health.counted + counts,
        skipped=health.skipped + ~good,
        in_a_row=jnp.where(good, 0, health.in_a_row + 1),
    ), limit


def choose(health: Health, new: PyTree, old: PyTree) -> PyTree:
    """`new` after a good step, else `old`, bit for bit; in the memory of `old`."""
    good = health.in_a_row == 0
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def as_meta(health: Health) -> JsonDict:
    """For a checkpoint; JSON holds a float32 exactly."""
    values = dataclasses.asdict(jax.device_get(health))
    return {name: value.item() for name, value in values.items()}


def from_meta(meta: JsonDict | None, abstract: Health) -> Health:
    """Undoes `as_meta`; fresh where a checkpoint of before has none.

    Args:
      meta: what `as_meta` gave.
      abstract: dtypes and shardings.
    """
    values = fresh() if meta is None else Health(**meta)
    return jax.tree.map(
        lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding),
        values,
        abstract,
    )
