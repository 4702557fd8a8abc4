"""Logical axis names, and the one table that maps them to the mesh.

A model names the axes of its weights (``nn.with_logical_partitioning(init, ("embed",
"mlp"))``) and of its activations (`constrain`), never a device. The table says on
which mesh axes each name lies:

* ``data``   holds different sequences and the same weights: the cheapest axis, it
  only sums gradients.
* ``fsdp``   holds different sequences *and* a slice of each weight, which XLA gathers
  just before its use. Weights are cut along ``embed``, the axis that almost each of
  them has, so that one rule shards the whole model.
* ``tensor`` cuts the work inside a layer (heads, hidden units, vocabulary), which
  costs a sum after each block: for fast links only.

Activations name their width ``embed_act``, not ``embed``: it stays whole, because
``fsdp`` already cuts the batch there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
from absl import logging
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from realm_retro.typing import Array, PyTree

Names: TypeAlias = Sequence[str | None]

RULES: Mapping[str, tuple[str, ...]] = {
    # Weights; heads, mlp and vocab name the same axes of activations.
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "head_dim": (),
    "layers": (),
    "norm": (),
    "positions": (),
    # Activations and batches.
    "batch": ("data", "fsdp"),
    "embed_act": (),
    "length": (),
    "chunks": (),
    "neighbours": (),
    "retrieved": (),
    # Rows of an index or a corpus that lies on the devices: over all of them.
    "rows": ("data", "fsdp", "tensor"),
}


def spec(
    names: Names, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The mesh axes of an array.

    A mesh axis is left out where it does not divide the dimension, and where an
    earlier dimension took it: the array is then whole along it, which is slower but
    right.

    Args:
      names: one logical name (a key of `RULES`) or None for each dimension.
      shape: the array's shape.
      mesh: the mesh whose axis sizes count.

    Raises:
      ValueError: an unknown name, or not one name for each dimension.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {names} for shape {shape}")
    taken: set[str] = set()
    entries = []
    for name, size in zip(names, shape, strict=True):
        chosen = []
        for axis in _mesh_axes(name):
            parts = mesh.shape[axis]
            if axis not in taken and parts > 1 and size % parts == 0:
                chosen.append(axis)
                size //= parts
        taken.update(chosen)
        entries.append(tuple(chosen) if len(chosen) > 1 else next(iter(chosen), None))
    return PartitionSpec(*entries)


def sharding(
    names: Names, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """`spec` on devices."""
    return NamedSharding(mesh, spec(names, shape, mesh))


def row_shares(mesh: Mesh) -> int:
    """How many parts the rows of a batch are cut in."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def constrain(x: Array, names: Names) -> Array:
    """Asks the compiler to lay an activation out by its axis names.

    A no-op where no mesh is active (`realm_retro.parallel.mesh.active`), so that a
    model runs the same on one device.

    Args:
      x: any activation.
      names: one logical name or None for each of its dimensions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def shardings(boxed: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """The sharding of each leaf of a tree of boxed parameters.

    Args:
      boxed: what ``module.init`` returns, or its `jax.eval_shape`: leaves boxed by
        ``nn.with_logical_partitioning``; leaves without a box are replicated.
      mesh: the devices.

    Returns:
      The tree of `NamedSharding` with the structure of `unbox(boxed)`.
    """
    whole: list[str] = []

    def one(path: tuple, leaf: PyTree) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        shape = leaf.value.shape
        found = spec(leaf.names, shape, mesh)
        if _flat(found) < _wanted(leaf.names, mesh):
            whole.append(f"{jax.tree_util.keystr(path)} {tuple(shape)}")
        return NamedSharding(mesh, found)

    tree = jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_box)
    if whole:
        logging.warning(
            "%d weights stay whole along a mesh axis that does not divide them: %s%s",
            len(whole),
            ", ".join(whole[:3]),
            ", …" if len(whole) > 3 else "",
        )
    return tree


def unbox(boxed: PyTree) -> PyTree:
    """Parameters without their axis names; nothing downstream sees the boxes."""
    return jax.tree.map(
        lambda leaf: leaf.value if _is_box(leaf) else leaf, boxed, is_leaf=_is_box
    )


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in RULES:
        raise ValueError(f"{name!r} is not a logical axis; those are {sorted(RULES)}")
    return RULES[name]


def _wanted(names: Names, mesh: Mesh | AbstractMesh) -> set[str]:
    axes = {axis for name in names for axis in _mesh_axes(name)}
    return {axis for axis in axes if mesh.shape[axis] > 1}


def _flat(found: PartitionSpec) -> set[str]:
    entries = (entry for entry in found if entry is not None)
    return {
        axis
        for entry in entries
        for axis in (entry if isinstance(entry, tuple) else (entry,))
    }


def _is_box(leaf: PyTree) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)
