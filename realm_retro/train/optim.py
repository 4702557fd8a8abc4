"""Clip, AdamW, cosine: which weights it moves, which it decays, and how fast."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from realm_retro.errors import UserError
from realm_retro.typing import PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The ``optimizer`` section of a config.

    Attributes:
      peak_learning_rate: reached after the warm-up.
      warmup_steps: steps of linear warm-up.
      final_fraction: learning rate of the last step, as a fraction of the peak.
      weight_decay: times the learning rate; decoupled (AdamW), matrices only.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      epsilon: added to the root of the latter.
      clip: largest norm of the gradient of all weights together; 0 for no limit.
    """

    peak_learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise ValueError(f"{field.name}={value} must not be negative")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An update rule and the weights that it may touch.

    Frozen weights never reach `transform`: they have no gradient, no moments and no
    decay, so nothing can move them.

    Attributes:
      transform: the rule, for the trainable weights only (`trainable_of`).
      schedule: step → learning rate.
      trainable: a bool for each weight.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    trainable: PyTree

    def trainable_of(self, params: PyTree) -> PyTree:
        """The same tree with None in place of frozen weights."""
        return select(params, self.trainable)


def make_optimizer(
    config: OptimizerConfig, *, steps: int, trainable: PyTree, decayed: PyTree
) -> Optimizer:
    """Builds the update rule of a run.

    Args:
      config: its numbers.
      steps: of the whole run.
      trainable: a bool for each weight.
      decayed: a bool for each weight; see `decay_mask`.

    Raises:
      UserError: the warm-up is longer than the run.
    """
    if config.warmup_steps > steps:
        raise UserError(
            f"config.optimizer.warmup_steps={config.warmup_steps} exceeds"
            f" config.train.steps={steps}; lower it"
        )
    schedule = warmup_cosine(config, steps)
    transform = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=select(decayed, trainable),
    )
    if config.clip:
        # Before Adam: it is the gradient that is clipped, not the update.
        transform = optax.chain(optax.clip_by_global_norm(config.clip), transform)
    return Optimizer(transform, schedule, trainable)


def warmup_cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then half a cosine down to the final fraction.

    The first step (0) has one part of the warm-up, not a learning rate of zero.
    """

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        after = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(after, 0.0, 1.0)))
        low = config.final_fraction
        return config.peak_learning_rate * warmup * (low + (1 - low) * cosine)

    return schedule


def decay_mask(boxed: PyTree) -> PyTree:
    """True for the weights that mix features: matrices from or to the model's width.

    Norms and biases are no matrices, also where scanned layers stack them. Tables
    looked up by row are left out too: a rare token's row sees a gradient seldom, and
    decay would shrink it at every step.

    Args:
      boxed: parameters (or their shapes) with axis names; where a weight has none,
        two dimensions make it a matrix.
    """

    def mixes(leaf: PyTree) -> bool:
        if not isinstance(leaf, nn.Partitioned):
            return len(leaf.shape) >= 2
        names = [name for name in leaf.names if name != "layers"]
        is_table = names[:1] in (["vocab"], ["positions"])
        return len(names) >= 2 and "embed" in names and not is_table

    return jax.tree.map(
        mixes, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )


def select(tree: PyTree, mask: PyTree) -> PyTree:
    """The tree with None, which JAX skips, wherever `mask` is False."""
    return jax.tree.map(lambda chosen, leaf: leaf if chosen else None, mask, tree)


def merge(chosen: PyTree, rest: PyTree) -> PyTree:
    """The leaves of `chosen`, and of `rest` wherever that has None."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, chosen, rest, is_leaf=lambda x: x is None
    )
