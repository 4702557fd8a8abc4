"""What stays of snapshots, versions and unfinished work, and what is deleted."""

from __future__ import annotations

import pathlib

from realm_retro import atomic
from realm_retro.retrieval.refresh import folder


def prune(root: pathlib.Path, *, keep: int) -> None:
    """Deletes what nobody needs any more; any process may call it at any time.

    There stay: the newest `keep` versions and those that somebody marked with
    `mark_using`; the newest `keep` snapshots and those that a version is being made
    from; of the versions in the making those that are newer than every finished one.
    """
    versions = folder.steps(root / folder.VERSIONS)
    snapshots = folder.steps(root / folder.SNAPSHOTS)
    stay = set(versions[-keep:]) | folder.in_use(root)
    finished = versions[-1] if versions else -1
    in_work: set[int] = set()
    for step, directory in folder.jobs(root):
        if step > finished:
            in_work.add(step)
        else:
            atomic.discard(directory)
    for step in versions:
        if step not in stay:
            atomic.discard(root / folder.VERSIONS / folder.step_name(step))
    stay = set(snapshots[-keep:]) | in_work
    for step in snapshots:
        if step not in stay:
            atomic.discard(root / folder.SNAPSHOTS / folder.step_name(step))
    folder.sweep(root / folder.VERSIONS, before=finished + 1)
    folder.sweep(root / folder.SNAPSHOTS, before=snapshots[-1] if snapshots else 0)
    folder.sweep(root / folder.BUILDING, before=0)
