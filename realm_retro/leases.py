"""Leases: which process makes which shard, and when another may take it over.

A lease is a file ``shard-00003.0001.json``. It is created exclusively, its time of
modification is its heartbeat, and it has expired when that is older than the seconds
its holder promised in it, by the clock of the file system; or at once when its holder
was a process of this host that is gone. An expired lease is never removed or
overwritten: it is superseded by the exclusive creation of the next number. So two that
find it expired cannot both take it, and a holder that slept too long sees that it has a
successor.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from typing import Self

from realm_retro import atomic
from realm_retro.typing import JsonDict

_NAME = re.compile(r"([a-z0-9-]+)\.(\d+)\.json")
_BEATS_PER_LIFE = 4
# Of a lease whose own promise cannot be read, and what a damaged one raises.
_DEFAULT_SECONDS = 60.0
_NO_PROMISE = (ValueError, LookupError, TypeError, ArithmeticError, RecursionError)


class Lease:
    """A claimed lease; as a context manager it keeps its heartbeat going.

    The heart beats in a thread, so a long call of the device does not cost the lease;
    it stops with the process, by SIGKILL as by SIGSTOP.
    """

    def __init__(
        self, folder: pathlib.Path, name: str, generation: int, seconds: float
    ):
        self._folder = folder
        self._name = name
        self._generation = generation
        self._interval = seconds / _BEATS_PER_LIFE
        self._path = folder / _file_name(name, generation)
        self._end = threading.Event()
        self._lost = threading.Event()
        self._heart = threading.Thread(
            target=self._beat, name=f"heartbeat {name}", daemon=True
        )

    def held(self) -> bool:
        """Whether it is still this process's: nobody took it over, it is not gone."""
        if not self._lost.is_set():
            newest = _generations(self._folder).get(self._name)
            if newest != self._generation:
                self._lost.set()
        return not self._lost.is_set()

    def release(self) -> None:
        """Lets another claim it at once; for work that was given up.

        After work that was done the file stays: it tells a sleeper of an earlier
        number that it was succeeded.
        """
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._heart.join()

    def _beat(self) -> None:
        while not self._end.wait(self._interval):
            try:
                # No time is named: the file system's own clock sets it.
                os.utime(self._path)
            except FileNotFoundError:
                self._lost.set()
            except OSError:
                continue  # A file system that stumbles gets another chance.
            if not self.held():
                return


def owner() -> str:
    """A name for this process among all that share work; new at each call."""
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"


def claim_first(
    folder: pathlib.Path, wanted: Iterable[str], *, owner: str, seconds: float
) -> tuple[str, Lease] | None:
    """Claims the first of `wanted` that is free or whose lease has expired.

    Args:
      folder: where the leases lie.
      wanted: what there is to do, in order of preference, e.g. ``shard-00003``.
      owner: who claims; for people who read the file.
      seconds: how long the lease lives without a heartbeat.

    Returns:
      What was claimed and the lease; None where all is held by others.
    """
    newest = _generations(folder)
    now = None
    for name in wanted:
        generation = newest.get(name, 0)
        if generation:
            now = now or atomic.clock(folder)
            _, remaining = _look(folder / _file_name(name, generation), now)
            if remaining >= 0:
                continue
        promise = {
            "owner": owner,
            "seconds": seconds,
            "claimed": time.time(),
            "machine": _machine(),
            "pid": os.getpid(),
        }
        if atomic.place_json(promise, folder / _file_name(name, generation + 1)):
            return name, Lease(folder, name, generation + 1, seconds)
    return None


def num_live(folder: pathlib.Path) -> int:
    """How many leases have a heartbeat: at least so many workers are alive."""
    return len(_live_promises(folder, _generations(folder)))


def owners(folder: pathlib.Path, wanted: Iterable[str]) -> set[str]:
    """Who holds any of the leases `wanted`."""
    held = _live_promises(folder, wanted)
    return {str(promise.get("owner", "?")) for promise in held}


def _live_promises(folder: pathlib.Path, wanted: Iterable[str]) -> list[JsonDict]:
    newest = _generations(folder)
    if not newest:
        return []
    now = atomic.clock(folder)
    looks = (
        _look(folder / _file_name(name, newest[name]), now)
        for name in wanted
        if name in newest
    )
    return [promise for promise, left in looks if 0 <= left < math.inf]


def _look(path: pathlib.Path, now: float) -> tuple[JsonDict, float]:
    """What a lease promises, and the seconds until it expires; negative: it has."""
    try:
        # Opening the file makes a network file system look at it anew.
        with path.open(errors="replace") as file:
            text, beat = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return {}, math.inf  # Released this moment: the next look will find it free.
    promise, seconds = {}, _DEFAULT_SECONDS
    with contextlib.suppress(*_NO_PROMISE):
        promise = dict(json.loads(text))
        seconds = float(promise["seconds"])
    return promise, -math.inf if _is_dead(promise) else seconds - (now - beat)


def _is_dead(promise: JsonDict) -> bool:
    """Whether its holder was a process of this host and is gone, without a doubt."""
    pid = promise.get("pid")
    if not isinstance(pid, int) or promise.get("machine") is None:
        return False
    if promise["machine"] != _machine():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # Somebody else's: there is one.
    return False


@functools.cache
def _machine() -> str | None:
    """This host since its start, and whose process numbers are seen in it.

    None where that cannot be told: a container may have another's name.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _generations(folder: pathlib.Path) -> dict[str, int]:
    """The highest number of each lease; one listing."""
    newest: dict[str, int] = {}
    for file_name in atomic.names(folder):
        if match := _NAME.fullmatch(file_name):
            newest[match[1]] = max(newest.get(match[1], 0), int(match[2]))
    return newest


def _file_name(name: str, generation: int) -> str:
    return f"{name}.{generation:04d}.json"
