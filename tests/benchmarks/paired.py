"""Timing of alternatives in turn, A B A B …: the machine's drift hits all alike."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def seconds(
    alternatives: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Wall seconds of each alternative in each round; each must end when it is done."""
    for run in alternatives.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def ratio(times: Mapping[str, list[float]], ours: str, theirs: str) -> dict[str, float]:
    """Ours over theirs, round by round: median, least and most. Below 1 is faster."""
    pairs = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}


def report(
    title: str,
    times: Mapping[str, list[float]],
    ratios: Mapping[str, dict[str, float]],
    *,
    path: str | None = None,
    **facts: object,
) -> None:
    """Prints a table; writes all of it as JSON where `path` is given."""
    print(f"{title} ({len(next(iter(times.values())))} rounds)")
    for name, values in times.items():
        low, high = min(values), max(values)
        print(
            f"  {name:<44} {statistics.median(values):9.4f} s  [{low:.4f}, {high:.4f}]"
        )
    for name, value in ratios.items():
        print(
            f"  {name:<44} {value['median']:9.3f}    [{value['min']:.3f},"
            f" {value['max']:.3f}]"
        )
    if path:
        body = {
            "title": title,
            "machine": f"{platform.machine()} {platform.python_version()}",
            **facts,
            "seconds": times,
            "ratios": ratios,
        }
        Path(path).write_text(json.dumps(body, indent=1))
