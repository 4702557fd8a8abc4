"""On many devices weights move to the rows of the batch, never rows to the weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from retro_examples import jit, small_config

from realm_retro.parallel import axes, hlo
from realm_retro.parallel import mesh as meshes
from realm_retro.retro.encoder import Encoder

ENCODER = small_config(
    encoder_dim=32,
    encoder_layers=1,
    encoder_num_heads=4,
    encoder_head_dim=8,
    encoder_ffw_dim=16,
)
ROWS, CHUNKS, K = 32, 6, 3


# 40 tokens can be cut in two, 37 cannot.
@pytest.mark.parametrize("vocab", [37, 40])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_neighbours_stay_where_they_are(sizes, vocab):
    config = dataclasses.replace(ENCODER, vocab_size=vocab)
    mesh = meshes.make_mesh(meshes.MeshConfig(*sizes))
    r, m = config.neighbour_length, config.chunk_length
    rows = functools.partial(axes.sharding, mesh=mesh)
    shapes = {
        "tokens": ((ROWS, CHUNKS, K, r), jnp.int32),
        "mask": ((ROWS, CHUNKS, K, r), bool),
        "chunks": ((ROWS, CHUNKS, m, config.model_dim), jnp.float32),
    }
    inputs = [
        jax.ShapeDtypeStruct(
            shape, kind, sharding=rows(("batch", None, None, None), shape)
        )
        for shape, kind in shapes.values()
    ]
    encoder = Encoder(config)
    boxed = jax.eval_shape(encoder.init, jax.random.key(0), *inputs)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        axes.unbox(boxed),
        axes.shardings(boxed, mesh),
    )

    def loss(params, *inputs):
        with meshes.active(mesh):
            return jnp.square(encoder.apply(params, *inputs)).sum()

    out = jax.tree.map(lambda x: x.sharding, placed)
    whole = NamedSharding(mesh, PartitionSpec())
    slope = jit(jax.value_and_grad(loss), out_shardings=(whole, out))
    text = slope.lower(placed, *inputs).compile().as_text()
    sent = hlo.parse(text).collectives(mesh.size)
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(placed))
    neighbours = ROWS * CHUNKS * K * r * config.encoder_dim * 4
    gathered = [one for one in sent if one.kind == "all-gather"]
    assert gathered, "weights are gathered before their use"
    assert max(one.payload for one in gathered) <= weights < neighbours / 8
