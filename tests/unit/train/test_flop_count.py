"""Operations counted in a jaxpr, against values worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from realm_retro.parallel.mesh import make_mesh
from realm_retro.train.flop_count import count

A = jax.ShapeDtypeStruct((4, 8), jnp.float32)
B = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 4 * 8 * 16
TURN = 2 * 4 * 8 * 8


def counted(f, *arguments):
    return count(jax.jit(f).trace(*arguments).jaxpr)


def test_a_product_and_a_batch_of_them():
    assert counted(jnp.matmul, A, B).total == PRODUCT
    stacked = jax.ShapeDtypeStruct((3, 4, 8), jnp.float32)
    found = counted(lambda a, b: jnp.einsum("bij,jk->bik", a, b), stacked, B)
    assert found.total == 3 * PRODUCT


def scanned(a, w):
    return jax.lax.scan(lambda a, _: (jnp.tanh(a @ w), None), a, None, length=7)[0]


def test_a_scan_counts_each_turn():
    found = counted(scanned, A, W)
    assert (found.total, found.once, found.unknown_loops) == (7 * TURN, TURN, 0)


def test_the_backward_pass_counts_what_is_computed_anew():
    def loss(a, w, body):
        return jax.lax.scan(lambda a, _: (body(a, w), None), a, None, length=7)[0].sum()

    def layer(a, w):
        return jnp.tanh(jnp.tanh(a @ w) @ w)

    def slope(body):
        return counted(jax.grad(lambda a, w: loss(a, w, body), (0, 1)), A, W).total

    # Two products forward, four backward; with rematerialisation two more.
    assert slope(layer) == 7 * 6 * TURN
    anew = slope(jax.checkpoint(layer))
    assert 7 * 6 * TURN < anew <= 7 * 8 * TURN


def test_the_dearer_branch_counts():
    def f(a, w, b):
        return jax.lax.cond(a.sum() > 0, lambda: (a @ w) @ b, lambda: a @ b)

    assert counted(f, A, W, B).total == TURN + PRODUCT


def test_a_loop_without_a_fixed_length_counts_once_and_is_told():
    def f(a, w):
        return jax.lax.while_loop(lambda a: a.sum() < 9, lambda a: a @ w, a)

    found = counted(f, A, W)
    assert (found.total, found.unknown_loops) == (TURN, 1)


@pytest.mark.parametrize(
    ("dtype", "precision", "passes"),
    [
        ("float32", None, 1),
        ("float32", jax.lax.Precision.HIGH, 3),
        ("float32", jax.lax.Precision.HIGHEST, 6),
        ("bfloat16", jax.lax.Precision.HIGHEST, 1),
    ],
)
def test_precision_costs_passes(dtype, precision, passes):
    a, b = (jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)) for x in (A, B))
    found = counted(lambda a, b: jnp.matmul(a, b, precision=precision), a, b)
    assert (found.total, found.passes) == (PRODUCT, passes * PRODUCT)


def test_what_each_device_does_counts_for_each():
    mesh = make_mesh()
    local = jax.shard_map(
        jnp.matmul,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )
    rows = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    assert counted(local, rows, B).total == 8 * PRODUCT


def test_convolutions():
    x = jax.ShapeDtypeStruct((2, 9, 5), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 5, 6), jnp.float32)

    def f(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    assert counted(f, x, kernel).total == 2 * (2 * 7 * 6) * 3 * 5
