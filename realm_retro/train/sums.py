"""Sums of arrays: any changed bit changes them, and no mesh does.

A checkpoint's files have no checksum for the numbers in them. These sums are taken of
the arrays before they are written and again of what was read, on the devices, so they
hold from end to end, whoever wrote which part and on however many devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.parallel import hosts
from realm_retro.typing import Array, PyTree

# Even: with 1 added, every multiple of it is odd, and a change that is multiplied by an
# odd number modulo 2³² never becomes 0.
_MIX = np.uint32(0x9E3779B2)


def of(tree: PyTree) -> dict[str, str]:
    """The dtype and the sum of each leaf, by its path.

    The sum of a leaf is Σ bits[i] · (i · `_MIX` + 1) modulo 2³², over its numbers in
    row-major order; one pass over the memory of each device.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    # XLA leaves so few numbers whole on every device, but nothing obliges it to.
    found = np.asarray(hosts.readable(_sums(arrays))) if leaves else ()
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype} {value:08x}"
        for (path, leaf), value in zip(leaves, found, strict=True)
    }


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of leaves that differ; what was read as another dtype is passed over."""
    return [
        name
        for name, value in before.items()
        if name in now
        and value != now[name]
        and value.split()[0] == now[name].split()[0]
    ]


@jax.jit
def _sums(leaves: list[Array]) -> Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # Numbers of 64 bits become two of 32, on a last axis.
    width = min(8 * x.dtype.itemsize, 32)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    place = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + along * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (place * _MIX + 1), dtype=jnp.uint32)
