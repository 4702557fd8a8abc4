"""The machine that a benchmark runs on: what it is, and which cores are whose."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterable, Iterator, Sequence

from realm_retro.typing import JsonDict

_PACKAGES = (
    "realm_retro",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "scann",
    "numpy",
)
_CPUS = pathlib.Path("/sys/devices/system/cpu")
_THREADS = pathlib.Path("/proc/self/task")


def load() -> str:
    """How busy the machine is: the average of a minute, of five, of fifteen."""
    if not hasattr(os, "getloadavg"):
        return "unknown"
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


def facts(*, load_before: str) -> JsonDict:
    """What a reader has to know to compare; starts JAX, so ask when all is measured.

    Args:
      load_before: what `load` said before the benchmark began.
    """
    import jax

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": len(_available()) or os.cpu_count(),
        "cores": len(cores()) or None,
        "memory_gb": _memory_gb(),
        "devices": [f"{device.device_kind}" for device in jax.devices()],
        "load_before": load_before,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def cores() -> list[tuple[int, ...]]:
    """The CPUs that this process may use, by physical core.

    Two threads of one core share its arithmetic, so they count as one. Empty where the
    system does not let a process choose its CPUs.
    """
    found: dict[str, list[int]] = {}
    for cpu in _available():
        found.setdefault(_siblings(cpu), []).append(cpu)
    return [tuple(cpus) for cpus in found.values()]


def split(
    all_cores: Sequence[Sequence[int]], others: int
) -> tuple[list[int], list[int]] | None:
    """CPUs of this process, and CPUs of processes beside it; None for a single core.

    Args:
      all_cores: from `cores`.
      others: cores of the processes beside it; 0 for half of all.
    """
    if len(all_cores) < 2:
        return None
    others = min(others or len(all_cores) // 2, len(all_cores) - 1)
    mine, theirs = all_cores[:-others], all_cores[-others:]
    return [c for core in mine for c in core], [c for core in theirs for c in core]


@contextlib.contextmanager
def pinned(cpus: Iterable[int]) -> Iterator[None]:
    """Keeps all threads of this process on some CPUs; afterwards they may roam again.

    Call it before JAX looks at the CPUs: it starts as many threads as there are.
    """
    cpus = set(cpus)
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    _move(cpus)
    try:
        yield
    finally:
        _move(before)


def _move(cpus: set[int]) -> None:
    for thread in os.listdir(_THREADS):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cpus)


def _available() -> list[int]:
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return round(pages / 1e9, 1)
    return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
