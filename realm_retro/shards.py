"""The shards of a stage, made by any number of processes on any number of hosts.

Each process opens the same stage, to be shared (`artifacts.Stage.open`), and makes
whatever shard is neither finished nor held by another, until all are finished. It holds
a shard by a lease with a heartbeat (`leases`). What a shard holds must not depend on
who makes it or after which: then the stage is the one that a single process makes.

* Processes join and leave at any time. One that is killed loses its leases, and others
  make its shards.
* One that slept beyond its lease finds that it has a successor and drops its shard.
  Were it to notice too late, the first to write a file wins, and nobody ever writes
  another over it.
* Whoever finds all shards finished commits, under a lease too; the others wait.

A bucket has no leases: there one process works alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

from realm_retro import atomic, leases, progress
from realm_retro.arrays import write_npy
from realm_retro.artifacts import PROGRESS, Manifest, Stage
from realm_retro.leases import Lease
from realm_retro.typing import HostArray, JsonDict

_LEASES = "leases"
_COMMIT = "commit"
# Between two looks at what others have finished, and at who they are.
_LOOK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of a stage and the files that hold them."""

    start: int
    stop: int
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How processes share a stage.

    Attributes:
      lease_seconds: how long a silent process keeps its shard.
      poll_seconds: between two looks while others hold all that is left.
    """

    lease_seconds: float = 60.0
    poll_seconds: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
    """A shard that this process makes.

    Attributes:
      number: which of the stage's.
      shard: its rows and files.
      lease: None in a bucket.
    """

    number: int
    shard: Shard
    lease: Lease | None
    _heart: contextlib.ExitStack

    def held(self) -> bool:
        """Whether it is still this process's."""
        return self.lease is None or self.lease.held()

    def close(self, *, release: bool) -> None:
        """Stops the heartbeat; `release` lets another have the shard at once."""
        self._heart.close()
        if release and self.lease is not None:
            self.lease.release()


@dataclasses.dataclass
class Totals:
    """What this process did: shards and rows made, and shards lost to others."""

    shards: int = 0
    rows: int = 0
    lost: int = 0


class Work:
    """One process's part in a shared stage; a context manager with a progress bar.

    ::

        with Work(stage, shards, label="embed", unit="chunks") as work:
            for claims in work.rounds():
                for claim in claims:
                    work.publish(claim, make(claim.shard), note)
            work.commit(summary)
    """

    def __init__(
        self,
        stage: Stage,
        shards: Sequence[Shard],
        *,
        label: str,
        unit: str,
        sharing: Sharing | None = None,
        report: Callable[[str], None] = print,
    ):
        """Nothing is claimed yet.

        Args:
          stage: opened to be shared.
          shards: all of the stage's, the same in every process; rows follow each other.
          label: the stage's name, before the bar and each line.
          unit: what a row is, e.g. ``chunks``.
          sharing: how long leases live.
          report: takes one line.
        """
        self.stage = stage
        self.shards = list(shards)
        self.owner = leases.owner()
        self.totals = Totals()
        self._sharing = sharing or Sharing()
        self._label, self._report = label, report
        local = atomic.local(stage.directory)
        self._leases = None if local is None else local / PROGRESS / _LEASES
        self._open: dict[int, Claim] = {}
        self._finished: set[int] = set()
        self._finished_rows = 0
        self._own_rows = 0  # made since the last shard was published
        self._num_claimed = 0
        self._looked = time.monotonic()
        self._waiting = False
        self.missing()
        self._bar = progress.bar(
            total=sum(shard.stop - shard.start for shard in self.shards),
            unit=unit,
            label=label,
            initial=self._finished_rows,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for claim in self._open.values():
            claim.close(release=True)
        self._open.clear()
        if self._leases is not None:
            # Where nothing was begun, nothing is left; see `Stage.released_on_error`.
            with contextlib.suppress(OSError):
                self._leases.rmdir()
        self.stage.close()
        self._bar.close()

    def missing(self) -> list[int]:
        """Numbers of the shards that nobody has finished; one listing."""
        try:
            recorded = set(self.stage.recorded())
        except FileNotFoundError:  # finished while it was listed
            recorded = set()
        whole = self.stage.finished
        left = []
        for number, shard in enumerate(self.shards):
            if number in self._finished:
                continue
            # A file that was deleted since is made again.
            if whole or (
                recorded.issuperset(shard.files)
                and all(self.stage.has(name) for name in shard.files)
            ):
                self._finished.add(number)
                self._finished_rows += shard.stop - shard.start
            else:
                left.append(number)
        return left

    def rounds(self) -> Iterator[Iterator[Claim]]:
        """Yields, until all shards are finished, the claims on what is free.

        Taking the next claim does not wait for other processes, so the next shard may
        be read while one is made. Between two rounds it does: each ends when others
        hold all that is left, and what is in hand then has to be published.
        """
        while self.missing():
            before = self._num_claimed
            yield self._free()
            if self._num_claimed == before:
                self._wait()

    def claim(self) -> Claim | None:
        """Claims the first shard that is free; None where there is none now."""
        while True:
            wanted = {
                f"shard-{number:05d}": number
                for number in self.missing()
                if number not in self._open
            }
            taken = self._take(list(wanted))
            if taken is None:
                return None
            name, lease = taken
            number = wanted[name]
            heart = contextlib.ExitStack()
            if lease is not None:
                heart.enter_context(lease)
            claim = Claim(number, self.shards[number], lease, heart)
            if number in self.missing():
                self._open[number] = claim
                self._num_claimed += 1
                self._waiting = False
                return claim
            claim.close(release=False)  # Finished after it was seen missing.

    def publish(
        self, claim: Claim, arrays: Mapping[str, HostArray], note: JsonDict
    ) -> bool:
        """Writes a shard's files, unless it has gone to another process meanwhile.

        Args:
          claim: from `rounds`.
          arrays: file → its content, in the order of the shard's files.
          note: for `commit`, kept with the shard.

        Returns:
          Whether they were written.
        """
        written = False
        try:
            written = claim.held() and self._write(claim, arrays, note)
        except FileNotFoundError:
            if not self.stage.finished:
                raise
        rows = claim.shard.stop - claim.shard.start
        claim.close(release=False)
        del self._open[claim.number]
        self._own_rows = 0
        if written:
            self.totals.shards += 1
            self.totals.rows += rows
        else:
            self.totals.lost += 1
            self._report(
                f"{self._label}: shard {claim.number} went to another process, this one"
                f" was silent for more than {self._sharing.lease_seconds:g} s"
            )
        self.missing()
        self._show()
        return written

    def advance(self, rows: int) -> None:
        """Counts rows of the shard that is being made."""
        self._own_rows += rows
        self._show()

    def commit(self, meta: Callable[[list[JsonDict]], JsonDict]) -> Manifest | None:
        """Commits the stage once, by one of the processes; all return after it.

        Args:
          meta: the notes of all shards → the manifest's meta.

        Returns:
          The manifest where this process wrote it.
        """
        self._show()
        self._bar.close()
        while not self.stage.finished:
            try:
                taken = self._take([_COMMIT])
                if taken is None:
                    time.sleep(self._sharing.poll_seconds)
                    continue
                with _released_on_error(taken[1]):
                    notes = [self.stage.noted(s.files[0]) for s in self.shards]
                    return self.stage.commit(meta([n for n in notes if n is not None]))
            except FileNotFoundError:  # Another was quicker.
                if not self.stage.finished:
                    raise
        return None

    def _free(self) -> Iterator[Claim]:
        while (claim := self.claim()) is not None:
            yield claim

    def _write(
        self, claim: Claim, arrays: Mapping[str, HostArray], note: JsonDict
    ) -> bool:
        # Before the shard: what was counted is there wherever the shard is.
        self.stage.note(claim.shard.files[0], {**note, "by": self.owner})
        with contextlib.suppress(_Lost):
            for name, array in arrays.items():
                with self.stage.write(name) as path:
                    write_npy(path, array)
                    if not claim.held():
                        raise _Lost
            return True
        return False

    def _take(self, wanted: Sequence[str]) -> tuple[str, Lease | None] | None:
        if not wanted:
            return None
        if self._leases is None:
            return wanted[0], None
        try:
            self._leases.mkdir(exist_ok=True)
            return leases.claim_first(
                self._leases,
                wanted,
                owner=self.owner,
                seconds=self._sharing.lease_seconds,
            )
        except FileNotFoundError:
            if not self.stage.finished:
                raise
            return None

    def _wait(self) -> None:
        missing = self.missing()
        if missing and not self._waiting:
            self._waiting = True
            holders = ", ".join(sorted(self._holders(missing))) or "others"
            self._report(
                f"{self._label}: waiting for {len(missing):,} shards held by {holders};"
                f" a process that is silent for {self._sharing.lease_seconds:g} s loses"
                " its own"
            )
        self._show()
        if missing:
            time.sleep(self._sharing.poll_seconds)

    def _show(self) -> None:
        """Brings the bar up to what all processes have made."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            if (count := len(self._holders(self.missing()) | {self.owner})) > 1:
                self._bar.set_postfix_str(f"{count} processes", refresh=False)
        made = min(self._finished_rows + self._own_rows, self._bar.total)
        # A shard that was lost is made again, but a bar does not go back.
        self._bar.update(max(0, made - self._bar.n))

    def _holders(self, numbers: Sequence[int]) -> set[str]:
        if self._leases is None or not numbers:
            return set()
        with contextlib.suppress(FileNotFoundError):
            return leases.owners(self._leases, [f"shard-{i:05d}" for i in numbers])
        return set()


def num_makers(notes: Sequence[JsonDict]) -> int:
    """How many processes made the shards that `Work.commit` tells of."""
    return len({note.get("by") for note in notes})


@contextlib.contextmanager
def _released_on_error(lease: Lease | None) -> Iterator[None]:
    try:
        with lease or contextlib.nullcontext():
            yield
    except BaseException:
        if lease is not None:
            lease.release()
        raise


class _Lost(Exception):
    """The lease went to another process while a file was written."""
