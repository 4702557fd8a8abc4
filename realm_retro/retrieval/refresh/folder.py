"""The folder that a trainer and its workers share: what lies where in it.

Whatever appears under its final name is whole, by the moves of `atomic`; that is all
the protocol asks of a file system.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterable

from etils import epath

from realm_retro import atomic
from realm_retro.errors import UserError

SNAPSHOTS = "snapshots"
VERSIONS = "versions"
BUILDING = "building"
USING = "using"
ENDED = "training_ended"

_STEP = re.compile(r"step-(\d{8,})")
_JOB = re.compile(r"step-(\d{8,})-[0-9a-f]+")
_PRIVATE_STEP = re.compile(r"\.step-(\d{8,})\.[0-9a-f]+")


def local(root: epath.PathLike) -> pathlib.Path:
    """The root as a path of the file system.

    Raises:
      UserError: it is a bucket.
    """
    path = atomic.local(root)
    if path is None:
        raise UserError(
            f"{os.fspath(root)}: index refresh needs a shared file system with atomic"
            " renames, a bucket has none; use a --workdir on one, such as an NFS mount"
        )
    return path


def step_name(step: int) -> str:
    """The name of what belongs to a step, ``step-00000100``."""
    return f"step-{step:08d}"


def steps(folder: pathlib.Path) -> list[int]:
    """The steps that have a directory in `folder`, ascending; one listing."""
    found = (_STEP.fullmatch(name) for name in atomic.names(folder))
    return sorted(int(m[1]) for m in found if m)


def jobs(root: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """(step, directory) of the versions in the making, ascending."""
    found = (_JOB.fullmatch(name) for name in atomic.names(root / BUILDING))
    return sorted((int(m[1]), root / BUILDING / m[0]) for m in found if m)


def private_name(step: int) -> str:
    """A name for a directory of `step` while it is filled; `steps` does not see it."""
    return f".{step_name(step)}.{secrets.token_hex(6)}"


def sweep(folder: pathlib.Path, *, before: int) -> None:
    """Deletes what killed processes left half-filled of steps below `before`."""
    for name in atomic.names(folder):
        match = _PRIVATE_STEP.fullmatch(name)
        if name.startswith(atomic.TRASH) or (match and int(match[1]) < before):
            shutil.rmtree(folder / name, ignore_errors=True)


def begin_training(root: epath.PathLike, *, step: int = 0) -> None:
    """Makes the folder ready for a training that starts, or goes on, at `step`.

    Takes the end mark of an earlier training away, and every snapshot and version of
    a later step: a training that goes on from step 100 must not meet the index of
    step 150 of its earlier life.
    """
    path = local(root)
    for part in (SNAPSHOTS, VERSIONS, BUILDING, USING):
        (path / part).mkdir(parents=True, exist_ok=True)
    found = {number for number, _ in jobs(path)}
    found.update(*(steps(path / part) for part in (SNAPSHOTS, VERSIONS)))
    for later in sorted(found):
        if later > step:
            forget(path, later)
    (path / ENDED).unlink(missing_ok=True)


def end_training(root: epath.PathLike) -> None:
    """Tells all workers to end."""
    path = local(root)
    path.mkdir(parents=True, exist_ok=True)
    (path / ENDED).touch()


def training_ended(root: epath.PathLike) -> bool:
    """Whether `end_training` was called since the last `begin_training`."""
    return (local(root) / ENDED).exists()


def forget(root: pathlib.Path, step: int) -> None:
    """Deletes the snapshot of a step and everything made from it."""
    for part in (SNAPSHOTS, VERSIONS, BUILDING):
        for name in atomic.names(root / part):
            # Work in progress carries its snapshot's fingerprint behind the step.
            if name == step_name(step) or name.startswith(f"{step_name(step)}-"):
                atomic.discard(root / part / name)


def mark_using(root: epath.PathLike, held: Iterable[int], *, owner: str) -> None:
    """Says which versions `owner` reads, or will after a restart: they are not deleted.

    Args:
      root: the shared folder.
      held: steps of the versions; replaces what the owner said before.
      owner: who, e.g. ``trainer``; a file name.
    """
    folder = local(root) / USING
    folder.mkdir(parents=True, exist_ok=True)
    atomic.replace_json({"steps": sorted(set(held))}, folder / f"{owner}.json")


def in_use(root: pathlib.Path) -> set[int]:
    """Steps of the versions that anybody uses.

    Raises:
      UserError: a mark cannot be read; nothing may be deleted then.
    """
    used: set[int] = set()
    for name in atomic.names(root / USING):
        if name.startswith("."):
            continue
        path = root / USING / name
        try:
            used.update(int(step) for step in json.loads(path.read_text())["steps"])
        except FileNotFoundError:
            continue
        except (
            ValueError,
            LookupError,
            TypeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise UserError(
                f"{path}: is damaged ({error}); delete it, its owner writes it anew"
            ) from None
    return used
