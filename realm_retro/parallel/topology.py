"""TPU chips and slices of them: what they can do, compiling for ones not at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from realm_retro.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip, which JAX sees as one device.

    Attributes:
      name: as in a topology.
      flops: bfloat16 operations a second, at most.
      hbm_bytes: memory.
      hbm_bandwidth: of it, bytes a second.
      link_bandwidth: of one link to a neighbour, bytes a second in one direction.
      dimensions: of the grid of chips.
      ring: a slice's dimensions close to rings where all of them are multiples of it.
      host_chips: chips that share a host, in slices of several hosts.
      one_host: the most chips that a slice of one host has.
      accelerator: Cloud TPU's name of a slice of ``{chips}`` chips or ``{cores}``.
      source: where the numbers are from.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    ring: int
    host_chips: int
    one_host: int
    accelerator: str
    source: str


# A link's bandwidth is the chip's (in both directions) over twice its links. v4's page
# gives the pod's all-reduce bandwidth alone: 1.1 PB/s over 4,096 chips of 6 links; the
# same division gives v5e's number from its pod's 51.2 TB/s over 256 chips of 4 links.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops=275e12,
            hbm_bytes=32 * GIB,
            hbm_bandwidth=1200e9,
            link_bandwidth=44.8e9,
            dimensions=3,
            ring=4,
            host_chips=4,
            one_host=4,
            accelerator="v4-{cores}",
            source="https://docs.cloud.google.com/tpu/docs/v4",
        ),
        Chip(
            name="v5e",
            flops=197e12,
            hbm_bytes=16 * GIB,
            hbm_bandwidth=819e9,
            link_bandwidth=50e9,
            dimensions=2,
            ring=16,
            host_chips=4,
            one_host=8,
            accelerator="v5litepod-{chips}",
            source="https://docs.cloud.google.com/tpu/docs/v5e",
        ),
        Chip(
            name="v5p",
            flops=459e12,
            hbm_bytes=95 * GIB,
            hbm_bandwidth=2765e9,
            link_bandwidth=100e9,
            dimensions=3,
            ring=4,
            host_chips=4,
            one_host=4,
            accelerator="v5p-{cores}",
            source="https://docs.cloud.google.com/tpu/docs/v5p",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips in a grid.

    Attributes:
      chip: of which kind.
      shape: chips along each dimension.
    """

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """How many hosts they hang on."""
        if self.chips <= self.chip.one_host:
            return 1
        return -(-self.chips // self.chip.host_chips)

    @property
    def accelerator(self) -> str:
        """Cloud TPU's name of a slice of this size."""
        return self.chip.accelerator.format(chips=self.chips, cores=2 * self.chips)

    @property
    def closed(self) -> bool:
        """Whether each dimension is a ring, not a line."""
        return all(size % self.chip.ring == 0 for size in self.shape)

    def bandwidth(self, coordinates: Iterable[Sequence[int]]) -> float:
        """What a chip can send to others of a group together, bytes a second.

        A ring has a link in each direction. On a line the chip at its end has one, and
        the others wait for it; a part of a ring is a line.

        Args:
          coordinates: of the chips of the group.
        """
        links = 0
        for held, size in zip(_held(coordinates), self.shape, strict=False):
            if held > 1:
                links += 2 if self.closed and held == size else 1
        return max(links, 1) * self.chip.link_bandwidth

    def exchange_bandwidth(self, coordinates: Iterable[Sequence[int]]) -> float:
        """What a chip can send where each of a group sends to every other.

        Half of what the chips of one half send goes through the links between the
        halves, of which the longest dimension has the fewest.

        Args:
          coordinates: of the chips of the group.
        """
        positions = list(coordinates)
        held = _held(positions)
        longest = max(range(len(held)), key=lambda d: held[d])
        closed = self.closed and held[longest] == self.shape[longest]
        # n/2 chips send half of their bytes over n/longest links, or twice as many.
        links = 4 / held[longest] * (2 if closed else 1)
        return min(links * self.chip.link_bandwidth, self.bandwidth(positions))

    def distance(self, one: Sequence[int], other: Sequence[int]) -> int:
        """Links between two chips, the shortest way."""
        steps = 0
        for a, b, size in zip(one, other, self.shape, strict=False):
            step = abs(a - b)
            steps += min(step, size - step) if self.closed else step
        return steps


def _held(coordinates: Iterable[Sequence[int]]) -> list[int]:
    """How many different coordinates a group has along each dimension."""
    return [len(set(axis)) for axis in zip(*coordinates, strict=True)]


def parse(text: str) -> Topology:
    """A topology from ``CHIP:AxB`` or ``CHIP:AxBxC``, such as ``v5e:8x8``.

    Raises:
      UserError: it is not one.
    """
    name, _, grid = text.partition(":")
    known = ", ".join(CHIPS)
    if name not in CHIPS or not grid:
        raise UserError(
            f"--topology={text}: write CHIP:AxB such as v5e:8x8; chips are {known}"
        )
    chip = CHIPS[name]
    example = "x".join(["4"] * chip.dimensions)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid):
        raise UserError(
            f"--topology={text}: {grid!r} is no grid; write {name}:{example}"
        )
    shape = tuple(map(int, grid.split("x")))
    if len(shape) != chip.dimensions:
        raise UserError(
            f"--topology={text}: {name} has {chip.dimensions} dimensions, not"
            f" {len(shape)}; write {name}:{example}"
        )
    return Topology(chip, shape)


def can_compile() -> bool:
    """Whether the TPU compiler, PyPI's ``libtpu``, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices(topology: Topology) -> list[Any]:
    """The slice's devices, to compile for: no TPU is needed, and none is touched.

    Raises:
      UserError: the compiler knows no such slice.
    """
    from jax.experimental import topologies

    # Or libtpu looks for the chips and the metadata server of a cloud machine.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    # Each slice's own, also where another was compiled for before.
    os.environ["TPU_ACCELERATOR_TYPE"] = topology.accelerator
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=str(topology)
        )
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology}: libtpu knows no such slice ({first}); choose"
            " another shape"
        ) from None
    return described.devices


def coordinates(device: Any) -> tuple[int, ...]:
    """Where a device of `devices` stands in the grid."""
    found: tuple[int, ...] = ()
    with contextlib.suppress(AttributeError):
        found = tuple(device.coords)
    return found or (device.id,)
