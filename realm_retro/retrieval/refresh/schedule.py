"""When the next snapshot is due: every so many steps, or as fast as embeddings move."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from realm_retro.typing import Float, HostArray, JsonDict

# How much one measurement may change the interval, up or down.
_LARGEST_CHANGE = 2.0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When snapshots are published. A value: its methods return the next one.

    Attributes:
      interval: steps from one snapshot to the next.
      last: the step of the last one.
      target_overlap: share of the top k that shall survive an interval; None keeps
        the interval as it is.
      shortest: bounds of an adaptive interval, in steps.
      longest: see `shortest`.
    """

    interval: int
    last: int = 0
    target_overlap: float | None = None
    shortest: int = 1
    longest: int = 1

    def due(self, step: int) -> bool:
        """Whether a snapshot of `step` is to be published."""
        return step - self.last >= self.interval

    def published(self, step: int) -> Schedule:
        """After a snapshot of `step`."""
        return dataclasses.replace(self, last=step)

    def measured(self, overlap: float, *, steps: int) -> Schedule:
        """After the top k of stale and fresh embeddings were compared.

        Args:
          overlap: share that is common to both, from `topk_overlap`.
          steps: how many lie between the two embedders.
        """
        if self.target_overlap is None or steps < 1:
            return self
        interval = next_interval(
            self.interval,
            overlap,
            steps=steps,
            target=self.target_overlap,
            shortest=self.shortest,
            longest=self.longest,
        )
        return dataclasses.replace(self, interval=interval)

    def as_meta(self) -> JsonDict:
        """JSON values, to be kept with a snapshot or a checkpoint."""
        return dataclasses.asdict(self)

    def resumed(self, meta: Mapping[str, Any]) -> Schedule:
        """With the interval and the last step that `as_meta` kept."""
        interval = int(meta["interval"])
        if self.target_overlap is None:
            interval = self.interval  # The config may have been changed meanwhile.
        return dataclasses.replace(self, interval=interval, last=int(meta["last"]))


def every(steps: int) -> Schedule:
    """A snapshot every `steps` steps.

    Raises:
      ValueError: `steps` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"every={steps} must be at least 1 step")
    return Schedule(interval=steps)


def adaptive(
    *, first: int, shortest: int, longest: int, target_overlap: float
) -> Schedule:
    """Often while the embedder moves fast, rarely later.

    Args:
      first: the first interval, in steps.
      shortest: the interval never gets shorter.
      longest: nor longer.
      target_overlap: share of the top k that shall survive an interval, in (0, 1).

    Raises:
      ValueError: these do not fit each other.
    """
    if not 1 <= shortest <= first <= longest:
        raise ValueError(
            f"shortest={shortest} ≤ every={first} ≤ longest={longest} must hold"
        )
    if not 0 < target_overlap < 1:
        raise ValueError(f"target_overlap={target_overlap} must lie between 0 and 1")
    return Schedule(
        interval=first,
        target_overlap=target_overlap,
        shortest=shortest,
        longest=longest,
    )


def next_interval(
    interval: int,
    overlap: float,
    *,
    steps: int,
    target: float,
    shortest: int,
    longest: int,
) -> int:
    """The interval after which `target` of the top k would have survived.

    The share that is lost grows about in proportion to the steps: over `steps` steps
    1 − `overlap` was lost, so 1 − `target` is lost over
    ``steps · (1 − target) / (1 − overlap)``. One measurement changes the interval at
    most twofold, for the measurement is noisy and the embedder's speed changes.
    """
    lost = max(1.0 - overlap, 1e-9)
    wanted = steps * (1.0 - target) / lost
    bounded = np.clip(wanted, interval / _LARGEST_CHANGE, interval * _LARGEST_CHANGE)
    return int(np.clip(round(float(bounded)), shortest, longest))


def topk_overlap(
    queries: Float[HostArray, "queries d"],
    stale: Float[HostArray, "probes d"],
    fresh: Float[HostArray, "probes d"],
    *,
    k: int,
) -> float:
    """Share of the k best passages of a query that stale and fresh embeddings agree on.

    Args:
      queries: embeddings of probe queries by the newer embedder, as a training step
        has them whichever index it asks.
      stale: embeddings of probe passages by the older embedder.
      fresh: embeddings of the same passages by the newer one.
      k: how many count; all where there are fewer.

    Returns:
      The mean over queries, from 0 to 1.

    Raises:
      ValueError: there is no query or no passage, or the passages do not correspond.
    """
    if len(stale) != len(fresh):
        raise ValueError(f"{len(stale)} stale passages are not {len(fresh)} fresh ones")
    k = min(k, len(stale))
    if k < 1 or not len(queries):
        raise ValueError("the overlap needs a query, a passage and k of at least 1")
    common = _top(queries, stale, k) & _top(queries, fresh, k)
    return float(common.sum(axis=1).mean() / k)


def _top(queries: HostArray, passages: HostArray, k: int) -> HostArray:
    """Which passages are among the k best, bool [q, n]; ties go to the lower row."""
    scores = np.asarray(queries, np.float32) @ np.asarray(passages, np.float32).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen
