"""Versions in the making: ``building/step-00000100-0123456789ab/``.

Behind the step stand the first digits of the snapshot's fingerprint, so that a worker
that still embeds with a snapshot which was replaced finds its folder gone and cannot
mix its shards into the new work. Inside lie ``plan.json``, the shards that are
finished, and ``leases/``.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Literal

from realm_retro import atomic, leases
from realm_retro.arrays import NpyWriter
from realm_retro.errors import UserError
from realm_retro.retrieval.refresh import folder
from realm_retro.retrieval.refresh.snapshots import Snapshot
from realm_retro.retrieval.refresh.versions import Target
from realm_retro.typing import HostArray, JsonDict

_PLAN = "plan.json"
_LEASES = "leases"

Publication = Literal["published", "duplicate", "lost"]


class Superseded(Exception):
    """The work was finished by others, or became void: choose again."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One version in the making.

    Attributes:
      step: of the snapshot.
      directory: where the finished shards lie.
      target: what the version shall hold.
      must_finish: a newer snapshot does not end it, because one before it was already
        given up: however fast snapshots come, some version is finished.
    """

    step: int
    directory: pathlib.Path
    target: Target
    must_finish: bool

    @property
    def leases(self) -> pathlib.Path:
        """Where its leases lie."""
        return self.directory / _LEASES

    def missing(self) -> list[int]:
        """Shards that are not finished."""
        there = set(atomic.names(self.directory))
        names = self.target.names()
        return [i for i, name in enumerate(names) if name not in there]

    def has(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return (self.directory / self.target.names()[shard]).exists()

    def age(self) -> float:
        """Seconds since it was begun, by the file system's clock."""
        begun = (self.directory / _PLAN).stat().st_mtime
        return atomic.clock(self.directory) - begun

    def publish(
        self, shard: int, vectors: HostArray, *, held: Callable[[], bool]
    ) -> Publication:
        """Writes a shard under a private name and places it, if nobody was quicker.

        Args:
          shard: which.
          vectors: float32 or float16 [rows, d], as `versions.check_shard` returns.
          held: whether the lease is still held; asked when all is on the disk.

        Raises:
          Superseded: the job is over.
        """
        name = self.target.names()[shard]
        try:
            with atomic.private_file(self.directory, name) as private:
                with NpyWriter(private, vectors.dtype, vectors.shape[1:]) as file:
                    file.append(vectors)
                if not held():
                    return "lost"
                placed = atomic.place(private, self.directory / name)
                return "published" if placed else "duplicate"
        except FileNotFoundError:
            raise Superseded(self.directory.name) from None


def begin(
    root: pathlib.Path, snapshot: Snapshot, target: Target, *, must_finish: bool
) -> Job:
    """Begins a version, or joins those who began it.

    Raises:
      UserError: they make it with other settings.
      Superseded: it was finished this moment.
    """
    digits = snapshot.fingerprint[:12]
    directory = root / folder.BUILDING / f"{folder.step_name(snapshot.step)}-{digits}"
    wanted = {**target.as_config(), "parents": dict(target.parents)}
    try:
        (directory / _LEASES).mkdir(parents=True, exist_ok=True)
        atomic.place_json({**wanted, "must_finish": must_finish}, directory / _PLAN)
        plan = _read(directory / _PLAN)
    except FileNotFoundError:
        raise Superseded(directory.name) from None
    if (root / folder.VERSIONS / folder.step_name(snapshot.step)).exists():
        # Published after the caller looked, and this began it once more.
        atomic.discard(directory)
        raise Superseded(directory.name)
    for key, value in wanted.items():
        if plan.get(key) != value:
            raise UserError(
                f"{directory / _PLAN}: another worker makes {key}={plan.get(key)}, this"
                f" one {value}; start all with the same --config, or delete {directory}"
            )
    return Job(snapshot.step, directory, target, bool(plan["must_finish"]))


def must_finish(directory: pathlib.Path) -> bool:
    """Whether the job in a directory has to be finished; see `Job`."""
    try:
        return bool(_read(directory / _PLAN)["must_finish"])
    except FileNotFoundError:
        return False


def num_workers(root: pathlib.Path) -> int:
    """How many leases are alive, of all jobs."""
    return sum(leases.num_live(path / _LEASES) for _, path in folder.jobs(root))


def _read(path: pathlib.Path) -> JsonDict:
    try:
        plan = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        plan = error
    if not isinstance(plan, dict) or "must_finish" not in plan:
        raise UserError(
            f"{path}: is no plan ({str(plan)[:80]}); delete {path.parent}, it is made"
            " again"
        )
    return plan
