"""What a step changes: the state, how it is born sharded, and where randomness is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realm_retro.parallel import axes
from realm_retro.train import guard
from realm_retro.train.optim import Optimizer
from realm_retro.typing import Array, PyTree

# Purposes of random keys. Every key is a function of (seed, purpose, step): nothing
# is carried along, so nothing has to be saved.
INIT = 0
LOSS = 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "health"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes, and all that a checkpoint holds.

    The same record also carries shapes or shardings in place of the arrays.

    Attributes:
      step: int32 scalar, steps done so far; also the position in the data.
      params: float32 weights.
      opt_state: the optimiser's, for trainable weights only.
      health: what tells a step that goes wrong.
    """

    step: PyTree
    params: PyTree
    opt_state: PyTree
    health: PyTree = dataclasses.field(default_factory=guard.fresh)


def key_for(seed: int, purpose: int, step: int | Array = 0) -> Array:
    """The random key of one purpose at one step."""
    key = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.random.fold_in(key, step)


def abstract_params(init: Callable[[Array], PyTree], mesh: Mesh) -> PyTree:
    """Shapes, dtypes and shardings of the weights; nothing is computed.

    Args:
      init: key → boxed parameters, as `Recipe.init`.
      mesh: where they will lie.
    """
    boxed = jax.eval_shape(init, jax.random.key(0))
    return _with_shardings(axes.unbox(boxed), axes.shardings(boxed, mesh))


def abstract_state(params: PyTree, optimizer: Optimizer) -> TrainState:
    """The state's shapes, dtypes and shardings; moments lie as their weights do.

    Args:
      params: from `abstract_params`.
      optimizer: whose state it holds.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    whole = NamedSharding(mesh, PartitionSpec())
    trainable = optimizer.trainable_of(params)
    shapes = jax.eval_shape(optimizer.transform.init, trainable)
    shardings = optax.tree.map_params(
        optimizer.transform,
        lambda _, weight: weight.sharding,
        shapes,
        trainable,
        transform_non_params=lambda _: whole,
    )
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params=params,
        opt_state=_with_shardings(shapes, shardings),
        health=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            guard.fresh(),
        ),
    )


def init_state(
    init: Callable[[Array], PyTree],
    optimizer: Optimizer,
    abstract: TrainState,
    seed: int,
) -> TrainState:
    """The state before the first step, born sharded: no device holds all of it."""

    def build(key: Array) -> TrainState:
        params = axes.unbox(init(key))
        opt_state = optimizer.transform.init(optimizer.trainable_of(params))
        return TrainState(jnp.int32(0), params, opt_state)

    return jax.jit(build, out_shardings=shardings_of(abstract))(key_for(seed, INIT))


def with_weights(
    state: TrainState, weights: PyTree, abstract: TrainState
) -> TrainState:
    """A fresh state whose parameters are `weights`, placed as `abstract` says.

    Raises:
      ValueError: a weight has another shape or name than the state's.
    """
    shapes = jax.tree.map(lambda x: x.shape, (weights, abstract.params))
    if shapes[0] != shapes[1]:
        raise ValueError("the weights to start from are not those of the model")
    placed = jax.tree.map(
        lambda x, like: jax.device_put(jnp.asarray(x, like.dtype), like.sharding),
        weights,
        abstract.params,
    )
    return dataclasses.replace(state, params=placed)


def shardings_of(abstract: PyTree) -> PyTree:
    """The sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )
