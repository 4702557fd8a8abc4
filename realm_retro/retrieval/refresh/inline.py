"""The same refresh in one call, in the process of the trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from realm_retro.errors import UserError
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
      ValueError: there is a newer snapshot or version; see `begin_training`.
      UserError: see `Worker.step`; or the snapshot cannot be read back.
    """
    path = folder.local(root)
    parents = target.parents if snapshot_parents is None else snapshot_parents
    for part in (folder.SNAPSHOTS, folder.VERSIONS):
        newest = max(folder.steps(path / part), default=step)
        if newest > step:
            raise ValueError(
                f"{path}: has {part} of step {newest}, after {step}; call"
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
    there = step in folder.steps(path / folder.VERSIONS)
    while step not in folder.steps(path / folder.VERSIONS):
        did = worker.step()
        if did is Did.NOTHING:
            # Finished by another this moment, or never: then this says why.
            snapshots.open_snapshot(root, step, parents=parents)
        if did in (Did.NOTHING, Did.WAIT):
            time.sleep(poll_seconds)
    # What was just made need not be read again.
    return versions.open_version(root, step, parents=wanted, verify=there)


def finished_version(
    root: epath.PathLike,
    step: int,
    arrays: Mapping[str, HostArray],
    *,
    parents: Mapping[str, str],
) -> Version | None:
    """What `refresh_inline` would find finished; writes nothing.

    Args:
      root: the shared folder; may be on a read-only disk.
      step: how many steps the parameters have seen.
      arrays: the embedder's parameters.
      parents: role → fingerprint, of the snapshot and of the version.

    Returns:
      The version; None where it is not there, or of other parameters or parents.

    Raises:
      UserError: it is damaged.
    """
    if step not in folder.steps(folder.local(root) / folder.VERSIONS):
        return None
    try:
        snapshot = snapshots.open_snapshot(root, step, parents=parents, verify=False)
        there = snapshot.arrays()
    except UserError:
        return None  # `publish_snapshot` replaces it.
    if there.keys() != arrays.keys() or not all(
        there[name].dtype == value.dtype and np.array_equal(there[name], value)
        for name, value in arrays.items()
    ):
        return None
    wanted = {**parents, "snapshot": snapshot.fingerprint}
    try:
        return versions.open_version(root, step, parents=wanted)
    except UserError as error:
        problem = str(error).partition(";")[0]  # the rest sends the user to a worker
        raise UserError(
            f"{problem}; delete {root} and run the same command again"
        ) from None
