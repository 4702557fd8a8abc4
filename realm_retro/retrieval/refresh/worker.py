"""A refresh worker: claims shards of the newest snapshot, embeds and publishes them."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
from etils import epath

from realm_retro import leases
from realm_retro.errors import UserError
from realm_retro.retrieval.refresh import (
    folder,
    jobs,
    retention,
    snapshots,
    versions,
)
from realm_retro.retrieval.refresh.jobs import Job
from realm_retro.retrieval.refresh.snapshots import Snapshot
from realm_retro.retrieval.refresh.versions import Target
from realm_retro.typing import HostArray

# start, stop → float [stop − start, d]: the vectors of those rows.
EmbedRows: TypeAlias = Callable[[int, int], HostArray]
# A snapshot's arrays → what embeds with them.
MakeEmbedder: TypeAlias = Callable[[Mapping[str, HostArray]], EmbedRows]


class Did(enum.Enum):
    """What one call of `Worker.step` did."""

    NOTHING = "there is no snapshot without a version"
    WAIT = "others are at work on all that is left"
    SHARD = "embedded a shard"
    VERSION = "published a version"


@dataclasses.dataclass
class Totals:
    """What a worker did in its life.

    Attributes:
      shards: published by it.
      rows: in them.
      seconds: spent embedding.
      versions: whose last act, the publication, was its.
      duplicates: shards that another had published meanwhile.
      lost: shards not published, because the lease had gone to another.
      dropped: versions given up for a newer snapshot.
      refused: snapshots that could not be read.
    """

    shards: int = 0
    rows: int = 0
    seconds: float = 0.0
    versions: int = 0
    duplicates: int = 0
    lost: int = 0
    dropped: int = 0
    refused: int = 0


class Worker:
    """See the module docstring; `step` does one piece of work, `run` all there is."""

    def __init__(
        self,
        root: epath.PathLike,
        make_embedder: MakeEmbedder,
        target: Target,
        *,
        lease_seconds: float = 60.0,
        keep: int = 2,
        report: Callable[[str], None] = print,
    ):
        """Opens the folder, creating it where it is not there.

        Args:
          root: the shared folder.
          make_embedder: called once for each snapshot.
          target: what a version holds.
          lease_seconds: how long a silent worker keeps its shard.
          keep: how many versions and snapshots stay.
          report: takes one line of progress.
        """
        self._root = folder.local(root)
        self._make_embedder = make_embedder
        self._target = target
        self._lease_seconds = lease_seconds
        self._keep = keep
        self._report = report
        self.owner = leases.owner()
        self.totals = Totals()
        self._loaded: tuple[Snapshot, EmbedRows] | None = None
        self._job: Job | None = None
        self._refused: set[tuple[int, ...]] = set()
        (self._root / folder.BUILDING).mkdir(parents=True, exist_ok=True)

    def step(self) -> Did:
        """Embeds one shard, or publishes a version that has all its shards.

        Each call looks at the snapshots again: between two shards a worker turns to
        the newest.

        Raises:
          UserError: the snapshot belongs to other passages, its vectors are not
            finite, or another worker has other settings.
        """
        try:
            job = self._choose()
            if job is None:
                return Did.NOTHING
            missing = job.missing()
            return self._embed_one(job, missing) if missing else self._publish(job)
        except jobs.Superseded:
            return Did.WAIT
        except FileNotFoundError:
            if self._job is None or self._job.directory.exists():
                raise
            return Did.WAIT  # The job ended while this one looked at it.

    def run(self, *, max_idle_seconds: float = 0.0, poll_seconds: float = 1.0) -> None:
        """Works until the training ends.

        Args:
          max_idle_seconds: ends as well when nothing has happened in the folder for
            so long; 0 waits for ever.
          poll_seconds: between two looks at the folder while there is nothing to do.
        """
        active, seen = time.monotonic(), ()
        alone = True  # no work was seen yet
        while not folder.training_ended(self._root):
            did = self.step()
            if did is Did.NOTHING and alone:
                self._report(_waiting(self._root, max_idle_seconds))
            alone = False
            if did in (Did.SHARD, Did.VERSION):
                active = time.monotonic()
                continue
            if (now_seen := self._visible()) != seen:
                active, seen = time.monotonic(), now_seen
            idle = time.monotonic() - active
            if max_idle_seconds and idle >= max_idle_seconds:
                self._report(f"nothing to do for {idle:.0f} s: this worker ends")
                return
            time.sleep(poll_seconds)
        self._report("the training has ended: this worker ends")

    def _choose(self) -> Job | None:
        """The newest snapshot's job, or an older one that has to be finished."""
        finished = max(folder.steps(self._root / folder.VERSIONS), default=-1)
        candidates = [
            step
            for step in folder.steps(self._root / folder.SNAPSHOTS)
            if step > finished and self._identity(step) not in self._refused
        ]
        if not candidates:
            return None
        newest = candidates[-1]
        begun = [(s, p) for s, p in folder.jobs(self._root) if finished < s < newest]
        bound = [s for s, p in begun if s in candidates and jobs.must_finish(p)]
        loaded = self._load(bound[-1] if bound else newest)
        if loaded is None:
            return None
        # Whoever turns away from one unfinished version binds all to the next.
        job = jobs.begin(self._root, loaded, self._target, must_finish=bool(begun))
        self._note(job, finished)
        return job

    def _load(self, step: int) -> Snapshot | None:
        """The snapshot, its embedder ready; None where it cannot be read."""
        try:
            snapshot = snapshots.open_snapshot(self._root, step, verify=False)
            if self._loaded and self._loaded[0].fingerprint == snapshot.fingerprint:
                return snapshot
            snapshot = snapshots.open_snapshot(self._root, step)
            arrays = snapshot.arrays()
        except (UserError, FileNotFoundError) as error:
            identity = self._identity(step)
            if identity:  # Else it was deleted: there is a newer one.
                self._refused.add(identity)
                self.totals.refused += 1
                self._report(f"{error}; waiting for another snapshot")
            return None
        for role, fingerprint in self._target.parents.items():
            theirs = snapshot.manifest.parents.get(role, fingerprint)
            if theirs != fingerprint:
                raise UserError(
                    f"{snapshot.manifest.directory}: is of a training over {role}"
                    f" {theirs[:12]}, this worker has {fingerprint[:12]}; start it with"
                    " the --config and --workdir of the training"
                )
        self._loaded = None  # The old weights go before the new ones come.
        self._loaded = (snapshot, self._make_embedder(arrays))
        return snapshot

    def _embed_one(self, job: Job, missing: list[int]) -> Did:
        shards = {f"shard-{i:05d}": i for i in missing}
        claimed = leases.claim_first(
            job.leases, shards, owner=self.owner, seconds=self._lease_seconds
        )
        if claimed is None:
            return Did.WAIT
        name, lease = claimed
        shard = shards[name]
        with lease, _released_on_error(lease):
            if job.has(shard):  # Finished after `missing` was asked.
                return Did.SHARD
            assert self._loaded is not None
            start, stop = rows = self._target.rows(shard)
            began = time.monotonic()
            vectors = versions.check_shard(
                np.asarray(self._loaded[1](start, stop)),
                rows=rows,
                target=self._target,
                step=job.step,
            )
            self.totals.seconds += time.monotonic() - began
            self._count(job, name, job.publish(shard, vectors, held=lease.held), rows)
        return Did.SHARD

    def _publish(self, job: Job) -> Did:
        claimed = leases.claim_first(
            job.leases, ["version"], owner=self.owner, seconds=self._lease_seconds
        )
        if claimed is None:
            return Did.WAIT
        assert self._loaded is not None
        with claimed[1] as lease, _released_on_error(lease):
            seconds = job.age()
            published = versions.publish_version(
                self._root,
                job.step,
                self._target,
                shards=job.directory,
                snapshot_fingerprint=self._loaded[0].fingerprint,
                meta={"seconds": round(seconds, 2), "published_by": self.owner},
            )
        retention.prune(self._root, keep=self._keep)
        self._job = None
        if not published:
            return Did.WAIT
        self.totals.versions += 1
        self._report(
            f"index of step {job.step}: {self._target.num_rows:,} vectors in"
            f" {seconds:.1f} s ({self._target.num_rows / max(seconds, 1e-9):,.0f}/s)"
        )
        return Did.VERSION

    def _count(
        self, job: Job, name: str, outcome: jobs.Publication, rows: tuple[int, int]
    ) -> None:
        if outcome == "published":
            self.totals.shards += 1
            self.totals.rows += rows[1] - rows[0]
        elif outcome == "duplicate":
            self.totals.duplicates += 1
            self._report(f"step {job.step}: {name} was published by another meanwhile")
        else:
            self.totals.lost += 1
            self._report(
                f"step {job.step}: {name} went to another worker, this one was silent"
                f" for more than {self._lease_seconds:g} s"
            )

    def _note(self, job: Job, finished: int) -> None:
        """Says which version it works on when that changes."""
        before, self._job = self._job, job
        if before is not None and before.directory == job.directory:
            return
        if before is not None and before.step > finished:
            self.totals.dropped += 1
            done = self._target.num_shards - len(before.missing())
            self._report(
                f"step {before.step} is outdated: dropped with {done} of"
                f" {self._target.num_shards} shards"
            )
        self._report(f"embedding with the snapshot of step {job.step}")

    def _visible(self) -> tuple[object, ...]:
        """What changes whenever anybody gets on."""
        return (
            folder.steps(self._root / folder.SNAPSHOTS),
            folder.steps(self._root / folder.VERSIONS),
            len(self._job.missing()) if self._job else 0,
        )

    def _identity(self, step: int) -> tuple[int, ...]:
        """Tells a snapshot from another of the same step; () where there is none."""
        directory = self._root / folder.SNAPSHOTS / folder.step_name(step)
        try:
            status = directory.stat()
        except FileNotFoundError:
            return ()
        return step, status.st_ino, status.st_mtime_ns


def _waiting(root: pathlib.Path, max_idle_seconds: float) -> str:
    most = f"{max_idle_seconds:g} s" if max_idle_seconds else "ever"
    return (
        f"waiting for a training to publish a snapshot in {root / folder.SNAPSHOTS},"
        f" for {most} (--max_idle_seconds)"
    )


@contextlib.contextmanager
def _released_on_error(lease: leases.Lease) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lease.release()
        raise
