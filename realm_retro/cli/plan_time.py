"""How long a step takes at best, by the roofline of a chip, and a run of them."""

from __future__ import annotations

from realm_retro.parallel.topology import Topology
from realm_retro.train.flop_count import Flops
from realm_retro.typing import JsonDict

_DAY = 86_400


def step_time(
    flops: Flops,
    formula: float,
    place: Topology,
    *,
    traffic: float | None,
    communication: float | None,
    steps: int,
    repeated: float = 1.0,
) -> JsonDict:
    """The time of a step and of a run.

    A chip multiplies, moves memory and talks to others at the same time, so that a
    step takes at least as long as the longest of the three (the roofline), and about
    their sum where nothing overlaps.

    Args:
      flops: counted, of all chips together.
      formula: of the model alone, without what is computed anew: the numerator of the
        model FLOP utilisation.
      place: the chips.
      traffic: bytes that a chip moves in its memory; None where unknown.
      communication: seconds of a chip's collectives; None where unknown.
      steps: of the run.
      repeated: how often each operation is done by some chip, by the compiler's
        count; below 1 it counts as 1.

    Returns:
      ``compute``, ``memory`` and ``communication``, ``roofline`` and ``serial``
      (nothing overlaps) in seconds of a step; ``mfu`` and ``serial_mfu``; ``days`` and
      ``device_hours`` of the run at the roofline, and the same with ``serial_``.
    """
    chip = place.chip
    parts = {
        "compute": max(1.0, repeated) * flops.passes / (place.chips * chip.flops),
        "memory": None if traffic is None else traffic / chip.hbm_bandwidth,
        "communication": communication,
    }
    known = [seconds for seconds in parts.values() if seconds is not None]
    roofline, serial = max(known), sum(known)
    result: JsonDict = {**parts, "roofline": roofline, "serial": serial}
    for prefix, seconds in (("", roofline), ("serial_", serial)):
        days = steps * seconds / _DAY
        result[f"{prefix}mfu"] = formula / (place.chips * chip.flops * seconds)
        result[f"{prefix}days"] = days
        result[f"{prefix}device_hours"] = 24 * days * place.chips
    return result
