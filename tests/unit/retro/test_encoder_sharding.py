"""On many devices weights move to the rows of the batch, never rows to the weights."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from retro_examples import jit, small_config

from realm_retro.parallel import axes, hlo
from realm_retro.parallel import mesh as meshes
from realm_retro.retro.encoder import Encoder

SIZES = small_config(
    encoder_dim=32, encoder_layers=1, encoder_num_heads=4, encoder_head_dim=8
)
ROWS, CHUNKS, K = 16, 6, 3


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_neighbours_stay_where_they_are(sizes):
    mesh = meshes.make_mesh(meshes.MeshConfig(*sizes))
    r, m = SIZES.neighbour_length, SIZES.chunk_length
    rows = functools.partial(axes.sharding, mesh=mesh)
    shapes = {
        "tokens": ((ROWS, CHUNKS, K, r), jnp.int32),
        "mask": ((ROWS, CHUNKS, K, r), bool),
        "chunks": ((ROWS, CHUNKS, m, SIZES.model_dim), jnp.float32),
    }
    inputs = [
        jax.ShapeDtypeStruct(
            shape, kind, sharding=rows(("batch", None, None, None), shape)
        )
        for shape, kind in shapes.values()
    ]
    encoder = Encoder(SIZES)
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
    neighbours = ROWS * CHUNKS * K * r * SIZES.encoder_dim * 4
    gathered = [one for one in sent if one.kind == "all-gather"]
    assert gathered, "weights are gathered before their use"
    assert max(one.payload for one in gathered) <= weights < neighbours / 8
