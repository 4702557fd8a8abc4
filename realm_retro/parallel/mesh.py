"""The only place that builds a device mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from realm_retro.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Since JAX 0.9 the default is Explicit, with which Linen's layers fail.
_AUTO = (AxisType.Auto,) * len(AXES)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; see `realm_retro.parallel.axes`.

    Attributes:
      data: replicas of the weights; −1 takes the devices that the others leave.
      fsdp: pieces that each weight is stored in; −1 likewise.
      tensor: pieces that each layer's work is cut into; −1 likewise.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"(data, fsdp, tensor) = {sizes}: each must be 1 or more, and one of"
                " them may be -1 (the devices that are left)"
            )


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """Lays devices out on the axes ``("data", "fsdp", "tensor")``.

    Args:
      config: the axis sizes; all devices on ``data`` where it is None.
      devices: the devices to use; all of them, of all hosts, where it is None.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not suit
        the grid that they stand in.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config or MeshConfig(), len(devices))
    try:
        return jax.make_mesh(sizes, AXES, axis_types=_AUTO, devices=devices)
    except NotImplementedError:
        asked = " x ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True))
        raise UserError(
            f"config.mesh: {asked} cannot be laid on the grid of these devices; make"
            " each size a product of whole dimensions of the grid"
        ) from None


def local_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The devices of this process alone, for work that processes do not share.

    Args:
      fsdp: see `MeshConfig`.
      tensor: likewise; ``data`` takes what the two leave.

    Raises:
      UserError: the sizes do not divide the number of devices.
    """
    devices = jax.local_devices()
    if len(devices) % (fsdp * tensor):
        raise UserError(
            f"config.embed: fsdp={fsdp} x tensor={tensor} does not divide the"
            f" {len(devices)} devices of this process; lower them"
        )
    return make_mesh(MeshConfig(-1, fsdp, tensor), devices)


def make_abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of so many devices that nobody has: to work out shapes and shardings.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    return AbstractMesh(_sizes(config, devices), AXES, axis_types=_AUTO)


def active(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager:
    """Inside a jitted function: makes `axes.constrain` lay out over `mesh`."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % given == 0:
        sizes[sizes.index(-1)] = devices // given
    if math.prod(sizes) != devices:
        asked = " x ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True))
        raise UserError(
            f"config.mesh: {asked} does not fit {devices} devices;"
            " set one axis to -1 or make the product equal"
        )
    return tuple(sizes)
