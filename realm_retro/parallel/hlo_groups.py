"""Which devices of a compiled program's collectives talk to each other."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?\s*)+)\}")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_TILED = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=" + _TILED)
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _TILED + r"\))? \{([^}]*)\}"
)
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """Who sends to whom in a permutation; nothing for other operations."""
    found = _PAIRS.search(attributes)
    numbers = [int(number) for number in re.findall(r"\d+", found[1])] if found else []
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices; of a permutation the first pair.

    Args:
      attributes: of an instruction, as it is written.
      devices: of the mesh, all one group where the text names none.
    """
    if sent := pairs(attributes):
        return sent[0]
    if listed := _LISTED.search(attributes):
        return tuple(map(int, listed[1].split(",")))
    if iota := _IOTA.search(attributes):
        ids = _ids(iota[2], iota[3]).reshape(_numbers(iota[1]))
        return tuple(map(int, ids[0]))
    if mesh := _MESH.search(attributes):
        return _along(mesh[1], mesh[2], mesh[3], mesh[4])
    return tuple(range(devices))


def _along(
    axes: str, sizes: str | None, order: str | None, names: str
) -> tuple[int, ...]:
    """A group along some axes of a mesh that the text describes."""
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    total = math.prod(mesh.values())
    ids = _ids(sizes, order) if sizes else np.arange(total)
    ids = ids.reshape(tuple(mesh.values()))
    taken, parts = [], {name: (1, size) for name, size in mesh.items()}
    for name, before, size in _AXIS.findall(names):
        # ``'a':(m)n`` is the part of axis a of size n, after one of size m.
        parts[name] = (int(before), int(size)) if size else (1, mesh[name])
        taken.append(name)
    split = [
        size
        for name, whole in mesh.items()
        for size in (*parts[name], whole // math.prod(parts[name]))
    ]
    chosen = [3 * list(mesh).index(name) + 1 for name in taken]
    ids = np.moveaxis(ids.reshape(split), chosen, range(len(chosen)))
    count = math.prod(split[place] for place in chosen)
    return tuple(map(int, ids.reshape(count, -1)[:, 0]))


def _ids(sizes: str, order: str | None) -> np.ndarray:
    shape = _numbers(sizes)
    axes = _numbers(order) if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(*axes)


def _numbers(text: str) -> Sequence[int]:
    return [int(number) for number in text.split(",")]
