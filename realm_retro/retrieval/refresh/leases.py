"""Leases: which worker embeds which shard, and when another may take it over.

A lease is a file ``shard-00003.0001.json``. It is created exclusively, its time of
modification is its heartbeat, and it has expired when that is older than the seconds
its holder promised in it, by the clock of the file system. An expired lease is never
removed or overwritten: it is superseded by the exclusive creation of the next number.
So two that find it expired cannot both take it, and a holder that slept too long sees
that it has a successor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterable
from typing import Self

from realm_retro.retrieval.refresh import folder as folders

_NAME = re.compile(r"([a-z0-9-]+)\.(\d+)\.json")
_BEATS_PER_LIFE = 4
# Of a lease whose own promise cannot be read.
_DEFAULT_SECONDS = 60.0


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
            now = now or folders.clock(folder)
            if _remaining(folder / _file_name(name, generation), now) >= 0:
                continue
        promise = {"owner": owner, "seconds": seconds, "claimed": time.time()}
        if folders.place_json(promise, folder / _file_name(name, generation + 1)):
            return name, Lease(folder, name, generation + 1, seconds)
    return None


def num_live(folder: pathlib.Path) -> int:
    """How many leases have a heartbeat: at least so many workers are alive."""
    newest = _generations(folder)
    if not newest:
        return 0
    now = folders.clock(folder)
    paths = (folder / _file_name(name, number) for name, number in newest.items())
    return sum(0 <= _remaining(path, now) < math.inf for path in paths)


def _remaining(path: pathlib.Path, now: float) -> float:
    """Seconds until the lease expires; negative where it has."""
    try:
        # Opening the file makes a network file system look at it anew.
        with path.open() as file:
            text, beat = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return math.inf  # Released this moment: the next look will find it free.
    seconds = _DEFAULT_SECONDS
    with contextlib.suppress(ValueError, KeyError, TypeError):
        seconds = float(json.loads(text)["seconds"])
    return seconds - (now - beat)


def _generations(folder: pathlib.Path) -> dict[str, int]:
    """The highest number of each lease; one listing."""
    newest: dict[str, int] = {}
    for file_name in folders.names(folder):
        if match := _NAME.fullmatch(file_name):
            newest[match[1]] = max(newest.get(match[1], 0), int(match[2]))
    return newest


def _file_name(name: str, generation: int) -> str:
    return f"{name}.{generation:04d}.json"
