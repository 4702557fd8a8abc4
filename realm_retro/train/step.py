"""The train step: a pure function of (state, batch), compiled once for a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realm_retro.parallel import axes
from realm_retro.parallel.mesh import active
from realm_retro.train import guard
from realm_retro.train import state as states
from realm_retro.train.optim import Optimizer, merge
from realm_retro.train.recipe import LossFn, Mean, Recipe
from realm_retro.train.state import TrainState
from realm_retro.typing import Array, Batch, PyTree

Metrics = dict[str, Mean]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    recipe: Recipe,
    optimizer: Optimizer,
    abstract: TrainState,
    mesh: Mesh,
    *,
    seed: int,
    accumulation: int = 1,
    max_loss_ratio: float = 0.0,
) -> jax.stages.Wrapped:
    """Builds the jitted step ``(state, batch) → (state, metrics)``.

    The old state's memory is donated to the new one, and a step that goes wrong (see
    `guard`) leaves weights and moments as they were. Metrics are (sum, weight) pairs
    over the global batch, replicated: ``loss`` and what the recipe adds; with weight 1
    ``grad_norm`` (before clipping), ``weight_norm`` (after the update; of trainable
    weights), ``learning_rate``, ``skipped`` (steps left out so far), and what
    `bad_steps` reads: ``bad_in_a_row``, above 0 where the step was bad, and
    ``loss_limit``.

    Args:
      recipe: whose loss and batch axes are used.
      optimizer: the update rule.
      abstract: the state's shapes and shardings.
      mesh: the devices.
      seed: of dropout and the like.
      accumulation: pieces that a batch is cut in; see `gradients`.
      max_loss_ratio: see `guard.judge`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with active(mesh):
            key = states.key_for(seed, states.LOSS, state.step)
            weights = optimizer.trainable_of(state.params)

            shared = {n: x for n, x in batch.items() if n not in recipe.batch_spec}
            own = {name: batch[name] for name in recipe.batch_spec}

            def loss(weights: PyTree, piece: Batch, key: Array):
                params = merge(weights, state.params)
                return recipe.loss(params, {**piece, **shared}, key)

            pieces = _cut(own, recipe.batch_spec, accumulation)
            grads, metrics = gradients(loss, weights, pieces, key)
        norm = jnp.asarray(optax.tree.norm(grads))
        health, limit = guard.judge(
            state.health, metrics["loss"], norm, max_loss_ratio=max_loss_ratio
        )
        updates, moments = optimizer.transform.update(grads, state.opt_state, weights)
        weights, opt_state = guard.choose(
            health,
            (optax.apply_updates(weights, updates), moments),
            (weights, state.opt_state),
        )
        notes = {
            "grad_norm": norm,
            "weight_norm": optax.tree.norm(weights),
            # The optimiser counts its own updates, without those that were left out.
            "learning_rate": optimizer.schedule(state.step - state.health.skipped),
            "skipped": health.skipped,
            "bad_in_a_row": health.in_a_row,
            "loss_limit": limit,
        }
        metrics |= {k: (jnp.float32(v), jnp.float32(1)) for k, v in notes.items()}
        params = merge(weights, state.params)
        return TrainState(state.step + 1, params, opt_state, health), metrics

    shardings = states.shardings_of(abstract)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(train_step, out_shardings=(shardings, whole), donate_argnums=0)


def gradients(
    loss: LossFn, weights: PyTree, pieces: Batch, key: Array
) -> tuple[PyTree, Metrics]:
    """The gradient of Σ loss / Σ weight over all pieces of the global batch.

    Sums are added first and divided once, so that the result depends neither on how
    the batch is cut nor on how its tokens are spread over pieces and devices.

    Args:
      loss: as `Recipe.loss`.
      weights: what to differentiate by.
      pieces: arrays ``[pieces, rows, …]``.
      key: random key of the step.

    Returns:
      The gradient, in the dtype of the weights, and the summed metrics.
    """

    def summed(weights: PyTree, piece: Batch, key: Array) -> tuple[Array, Metrics]:
        total, weight, further = loss(weights, piece, key)
        return total, {"loss": (total, weight), **further}

    def one(piece: Batch, index: Array) -> tuple[PyTree, Metrics]:
        key_ = jax.random.fold_in(key, index)
        return jax.grad(summed, has_aux=True)(weights, piece, key_)

    count = len(jax.tree.leaves(pieces)[0])
    if count == 1:
        piece = jax.tree.map(lambda x: x[0], pieces)
        grads, metrics = one(piece, jnp.int32(0))
    else:

        def add(total: PyTree, indexed: tuple[Batch, Array]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, one(*indexed)), None

        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(one, first, jnp.int32(0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add, zeros, (pieces, jnp.arange(count)))
    weight = metrics["loss"][1]
    # A batch without any target has gradient 0, not 0 / 0.
    scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
    return jax.tree.map(lambda g: g * scale, grads), metrics


def _cut(batch: Batch, spec: Mapping[str, axes.Names], pieces: int) -> Batch:
    """``[rows, …] → [pieces, rows / pieces, …]``, each piece on all devices.

    Piece i takes rows i, i + pieces, …: a device then finds a part of each piece
    among the rows that it holds already, and nothing moves.
    """

    def one(name: str, x: Array) -> Array:
        cut = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
        return axes.constrain(cut, (None, *spec[name]))

    return {name: one(name, x) for name, x in batch.items()}
