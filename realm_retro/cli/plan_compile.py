"""Compiles a train step for TPUs that are not there, and reads what comes out."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from realm_retro.cli.plan_task import Task
from realm_retro.parallel import hlo, hlo_traffic, topology
from realm_retro.parallel.hlo import Collective
from realm_retro.parallel.topology import Topology
from realm_retro.train import flop_count
from realm_retro.train.flop_count import Flops
from realm_retro.typing import JsonDict

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LISTED = 6


def trace(task: Task) -> tuple[Any, Flops]:
    """The traced step, and the operations of all devices together."""
    traced = task.step.trace(task.state, task.batch)
    return traced, flop_count.count(traced.jaxpr)


def compiled(traced: Any, flops: Flops, mesh: Mesh, place: Topology) -> JsonDict:
    """What the compiler makes of a traced step.

    Returns:
      ``seconds`` that it took; ``needed``, bytes of memory of a device. Where that is
      more than the chip has the compiler stops there: ``refused`` is then its message,
      ``capacity`` what it says that the chip has, ``buffers`` the largest arrays, and
      nothing else is known (see `refusal`). Otherwise ``temporaries``, ``outputs``
      (those in place of an argument not counted) and ``program``, bytes;
      ``traffic``, bytes that a device reads and writes in its memory; ``repeated``,
      how often each operation is done by some device (1 where no work is done twice);
      ``collectives`` by kind, ``communication_seconds`` and the largest of them;
      ``arrays``, the largest; ``unknown_loops``.
    """
    started = time.monotonic()
    try:
        made = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = refusal(str(error))
        if found is None:
            raise
        return {
            "seconds": time.monotonic() - started,
            **found,
            "refused": str(error).splitlines()[0],
            "buffers": largest_buffers(str(error)),
        }
    seconds = time.monotonic() - started
    memory, text = made.memory_analysis(), made.as_text()
    assert memory is not None
    assert text is not None
    program = hlo.parse(text)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {
        "temporaries": memory.temp_size_in_bytes,
        "outputs": outputs,
        "program": memory.generated_code_size_in_bytes,
    }
    costs = made.cost_analysis() or {}
    once = float(costs.get("flops", 0.0)) * mesh.size
    return {
        "seconds": seconds,
        "needed": memory.argument_size_in_bytes + sum(parts.values()),
        **parts,
        "traffic": hlo_traffic.traffic(program),
        "repeated": once / flops.once if flops.once else 0.0,
        **_communication(program.collectives(mesh.size), mesh, place),
        "arrays": [
            {"bytes": size, "shape": shape, "source": source}
            for size, shape, source in hlo_traffic.largest(program, _LISTED)
        ],
        "unknown_loops": program.unknown_loops(),
    }


def refusal(message: str) -> JsonDict | None:
    """What the compiler says of memory that does not suffice; None for other errors.

    Returns:
      ``needed`` and ``capacity`` in bytes, or where it names only the temporaries
      those, and None for ``needed``.
    """
    size = r"([\d.]+)([KMGT]?)"
    if found := re.search(rf"Used {size} of {size} hbm", message):
        needed, capacity = _size(found[1], found[2]), _size(found[3], found[4])
        return {"needed": needed, "capacity": capacity}
    if found := re.search(rf"required for HLO temporaries \({size}\)", message):
        return {"needed": None, "temporaries": _size(found[1], found[2])}
    return None


def _size(number: str, unit: str) -> int:
    return round(float(number) * _UNITS.get(unit, 1))


def largest_buffers(message: str) -> list[JsonDict]:
    """The largest allocations that the compiler names where memory does not suffice."""
    pattern = (
        r"Size: ([\d.]+)([KMGT]?)\s+(?:Operator: op_name=\"([^\"]*)\"\s+)?Shape: (\S+)"
    )
    return [
        {
            "bytes": _size(size, unit),
            "shape": shape,
            "source": source,
        }
        for size, unit, source, shape in re.findall(pattern, message)
    ][:_LISTED]


def _communication(
    collectives: Sequence[Collective], mesh: Mesh, place: Topology
) -> JsonDict:
    at = [topology.coordinates(device) for device in mesh.devices.flat]
    kinds: dict[str, JsonDict] = {}
    listed, total = [], 0.0
    for one in collectives:
        group = [at[i] for i in one.group]
        if one.pairs:
            # A link carries what all pairs send over it: as far as the longest way.
            far = max(place.distance(*(at[i] for i in pair)) for pair in one.pairs)
            seconds = one.sent * max(far, 1) / place.chip.link_bandwidth
        elif one.kind == "all-to-all":
            seconds = one.sent / place.exchange_bandwidth(group)
        else:
            seconds = one.sent / place.bandwidth(group)
        total += seconds
        entry = kinds.setdefault(one.kind, {"times": 0, "bytes": 0, "seconds": 0.0})
        entry["times"] += one.times
        entry["bytes"] += one.times * one.payload
        entry["seconds"] += seconds
        listed.append(
            {
                "kind": one.kind,
                "shape": one.shape[:120],
                "times": one.times,
                "devices": len(one.group),
                "bytes": one.payload,
                "seconds": seconds,
                "source": one.source,
            }
        )
    listed.sort(key=lambda entry: -entry["seconds"])
    return {
        "collectives": kinds,
        "communication_seconds": total,
        "largest_collectives": listed[:_LISTED],
    }
