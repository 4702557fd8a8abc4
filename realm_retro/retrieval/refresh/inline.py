"""The same refresh in one call, in the process of the trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from realm_retro.retrieval.refresh import folder, snapshots, versions
from realm_retro.retrieval.refresh.versions import Target, Version
from realm_retro.retrieval.refresh.worker import Did, MakeEmbedder, Worker
from realm_retro.typing import HostArray


def refresh_inline(
    root: epath.PathLike,
    step: int,
    arrays: Mapping[str, HostArray],
    make_embedder: MakeEmbedder,
    target: Target,
    *,
    meta: Mapping[str, Any] | None = None,
    snapshot_parents: Mapping[str, str] | None = None,
    keep: int = 2,
    lease_seconds: float = 60.0,
    poll_seconds: float = 0.1,
    report: Callable[[str], None] = print,
) -> Version:
    """Publishes a snapshot and makes its version before it returns.

    Workers that run beside it take their share. What a call that was cut off has
    finished is not done again; a version that exists is returned at once.

    Args:
      root: the shared folder.
      step: how many steps the parameters have seen.
      arrays: the embedder's parameters; see `publish_snapshot`.
      make_embedder: arrays → what embeds rows with them.
      target: what the version holds.
      meta: kept with the snapshot.
      snapshot_parents: of the snapshot; None for the target's.
      keep: how many snapshots and versions stay.
      lease_seconds: how long a silent worker beside it keeps its shard.
      poll_seconds: between two looks while others have the last shards.
      report: takes one line of progress.

    Raises:
      ValueError: there is a newer snapshot; see `begin_training`.
      UserError: see `Worker.step`.
    """
    path = folder.local(root)
    parents = target.parents if snapshot_parents is None else snapshot_parents
    newer = [s for s in folder.steps(path / folder.SNAPSHOTS) if s > step]
    if newer:
        raise ValueError(
            f"{path}: has a snapshot of step {newer[-1]}, after {step}; call"
            " begin_training with the step that the training goes on from"
        )
    snapshot = snapshots.publish_snapshot(
        root, step, arrays, meta=meta, parents=parents, keep=keep
    )
    worker = Worker(
        root,
        make_embedder,
        target,
        lease_seconds=lease_seconds,
        keep=keep,
        report=report,
    )
    wanted = {**target.parents, "snapshot": snapshot.fingerprint}
    while step not in folder.steps(path / folder.VERSIONS):
        if worker.step() in (Did.NOTHING, Did.WAIT):
            time.sleep(poll_seconds)
    return versions.open_version(root, step, parents=wanted, verify=False)
