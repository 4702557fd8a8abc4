"""Sums that tell any changed bit, whatever the dtype and wherever the array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training as toy

from realm_retro.parallel import axes
from realm_retro.train import sums

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"]


def random(dtype, shape=(6, 5)):
    rng = np.random.default_rng(0)
    return np.asarray(rng.integers(-3, 3, shape)).astype(jnp.dtype(dtype))


def by_hand(array):
    """The formula, number by number."""
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    total = 0
    for place, value in enumerate(bits.tolist()):
        total += value * ((place * 0x9E3779B2 + 1) % 2**32)
    return f"{array.dtype} {total % 2**32:08x}"


def test_the_formula():
    shapes = [(), (1,), (7,), (6, 5), (2, 0), (2, 3, 4)]
    arrays = [random(dtype, shape) for dtype in DTYPES for shape in shapes]
    found = sums.of([jnp.asarray(array) for array in arrays])
    assert list(found.values()) == [by_hand(array) for array in arrays]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_bit_counts(dtype):
    array = random(dtype, (2, 2))
    before = sums.of([jnp.asarray(array)])
    for place in range(array.nbytes * 8):
        spoilt = bytearray(array.tobytes())
        spoilt[place // 8] ^= 1 << place % 8
        other = np.frombuffer(spoilt, array.dtype).reshape(array.shape)
        assert sums.changed(before, sums.of([jnp.asarray(other)])) == ["[0]"]


def test_order_counts():
    array = random("float32")
    before = sums.of([jnp.asarray(array)])
    assert sums.changed(before, sums.of([jnp.asarray(array[::-1])]))
    assert sums.changed(before, sums.of([jnp.asarray(array.T)]))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_no_mesh_changes_them(sizes):
    array = random("float32", (16, 8))
    mesh = toy.mesh_of(*sizes)
    for names in (("batch", None), ("embed", "mlp"), (None, None)):
        placed = jax.device_put(array, axes.sharding(names, array.shape, mesh))
        # As several hosts need it: each reads them from its own devices.
        assert sums._sums([placed]).is_fully_replicated
        assert sums.of([placed]) == sums.of([jnp.asarray(array)])


def test_another_dtype_is_not_compared():
    array = jnp.ones(3)
    assert not sums.changed(sums.of([array]), sums.of([array.astype(jnp.bfloat16)]))
    assert not sums.changed(sums.of([array]), sums.of([]))
    assert sums.of({}) == {}
