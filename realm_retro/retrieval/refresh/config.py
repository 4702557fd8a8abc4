"""The settings of index refresh, section ``refresh`` of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from realm_retro.retrieval.refresh import schedule as schedules
from realm_retro.retrieval.refresh.schedule import Schedule
from realm_retro.retrieval.refresh.versions import Target


@dataclasses.dataclass(frozen=True)
class RefreshConfig:
    """How the index is kept fresh (section ``refresh``); for trainer and workers.

    Attributes:
      every: steps between snapshots; the first interval of an adaptive schedule.
      target_overlap: 0 publishes every `every` steps; else the interval adapts so
        that this share of the top k survives it, between `shortest` and `longest`.
      shortest: of an adaptive schedule, in steps.
      longest: of an adaptive schedule, in steps.
      max_staleness: the trainer waits rather than use an index that is older, in
        steps; 0 never waits.
      dtype: of the stored vectors, ``float32`` or ``float16``.
      shard_rows: passages of a shard, the unit of work.
      lease_seconds: after so long without a heartbeat a shard goes to another worker.
      poll_seconds: between two looks at the shared folder.
      keep: how many of the newest snapshots and versions stay.
    """

    every: int = 500
    target_overlap: float = 0.0
    shortest: int = 50
    longest: int = 5000
    max_staleness: int = 0
    dtype: str = "float32"
    shard_rows: int = 8192
    lease_seconds: float = 60.0
    poll_seconds: float = 1.0
    keep: int = 2

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={self.dtype!r} must be 'float32' or 'float16'")
        if self.keep < 2:
            raise ValueError(
                f"keep={self.keep} must be at least 2: one is read as another appears"
            )
        for name in ("every", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lease_seconds", "poll_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness={self.max_staleness} must not be negative")
        self.schedule()

    def schedule(self) -> Schedule:
        """When snapshots are due."""
        if not self.target_overlap:
            return schedules.every(self.every)
        return schedules.adaptive(
            first=self.every,
            shortest=self.shortest,
            longest=self.longest,
            target_overlap=self.target_overlap,
        )

    def target(self, num_rows: int, parents: Mapping[str, str]) -> Target:
        """What a version over `num_rows` passages holds."""
        return Target(
            num_rows=num_rows,
            parents=parents,
            dtype=self.dtype,
            shard_rows=self.shard_rows,
        )
