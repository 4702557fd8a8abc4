"""The folder that a trainer and its workers share, and the few atomic moves on it.

Whatever appears under its final name is whole: a file is written under a private name
and linked, a directory is filled under a private name and renamed. Both moves are
atomic and exclusive on a POSIX file system, a network one included; that is all the
protocol asks of it. A bucket has neither.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from realm_retro.errors import UserError

SNAPSHOTS = "snapshots"
VERSIONS = "versions"
BUILDING = "building"
USING = "using"
ENDED = "training_ended"

_STEP = re.compile(r"step-(\d{8,})")
_JOB = re.compile(r"step-(\d{8,})-[0-9a-f]+")
_PRIVATE_STEP = re.compile(r"\.step-(\d{8,})\.[0-9a-f]+")
_TRASH = ".trash-"
# What file systems without hard links answer.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}


def local(root: epath.PathLike) -> pathlib.Path:
    """The root as a path of the file system.

    Raises:
      UserError: it is a bucket.
    """
    text = os.fspath(root)
    if "://" in text:
        raise UserError(
            f"{text}: index refresh needs a shared file system with atomic renames, a"
            " bucket has none; use a --workdir on one, such as an NFS mount"
        )
    return pathlib.Path(text)


def step_name(step: int) -> str:
    """The name of what belongs to a step, ``step-00000100``."""
    return f"step-{step:08d}"


def steps(folder: pathlib.Path) -> list[int]:
    """The steps that have a directory in `folder`, ascending; one listing."""
    return sorted(int(m[1]) for name in names(folder) if (m := _STEP.fullmatch(name)))


def names(folder: pathlib.Path) -> list[str]:
    """The names in `folder`; none where it is not there (yet, or any more)."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def jobs(root: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """(step, directory) of the versions in the making, ascending."""
    found = (_JOB.fullmatch(name) for name in names(root / BUILDING))
    return sorted((int(m[1]), root / BUILDING / m[0]) for m in found if m)


def private_name(step: int) -> str:
    """A name for a directory of `step` while it is filled; `steps` does not see it."""
    return f".{step_name(step)}.{secrets.token_hex(6)}"


@contextlib.contextmanager
def private_file(folder: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Yields a path for a file that no other process writes; it is gone at the end."""
    path = folder / f".{name}.{secrets.token_hex(6)}"
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def place(private: pathlib.Path, final: pathlib.Path) -> bool:
    """Gives a whole file its final name; False where another has it already."""
    flush(private)
    try:
        os.link(private, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Not exclusive, but whole: two that come here at once hold the same content.
        if final.exists():
            return False
        os.replace(private, final)
    return True


def place_json(value: Any, final: pathlib.Path) -> bool:
    """`place` for a JSON value."""
    with private_file(final.parent, final.name) as private:
        private.write_text(json.dumps(value, indent=1, sort_keys=True))
        return place(private, final)


def replace_json(value: Any, final: pathlib.Path) -> None:
    """Writes a JSON value whole over what is there."""
    with private_file(final.parent, final.name) as private:
        private.write_text(json.dumps(value, indent=1, sort_keys=True))
        flush(private)
        os.replace(private, final)


def place_directory(private: pathlib.Path, final: pathlib.Path) -> bool:
    """Gives a filled directory its final name; False where another has it already."""
    try:
        os.rename(private, final)
    except OSError as error:
        if error.errno not in _NOT_EMPTY:
            raise
        return False
    return True


def discard(path: pathlib.Path) -> None:
    """Deletes a directory so that nobody ever sees half of it."""
    trash = path.parent / f"{_TRASH}{secrets.token_hex(6)}"
    # Another may have been quicker.
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: pathlib.Path, *, before: int) -> None:
    """Deletes what killed processes left half-filled of steps below `before`."""
    for name in names(folder):
        match = _PRIVATE_STEP.fullmatch(name)
        if name.startswith(_TRASH) or (match and int(match[1]) < before):
            shutil.rmtree(folder / name, ignore_errors=True)


def clock(folder: pathlib.Path) -> float:
    """Now, in seconds, by the clock that stamps the files of `folder`.

    On a network file system that is the server's: hosts' clocks need not agree.
    """
    with private_file(folder, "clock") as path:
        path.touch()
        return path.stat().st_mtime


def flush(path: pathlib.Path) -> None:
    """Returns when the file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        for name in names(root / part):
            # Work in progress carries its snapshot's fingerprint behind the step.
            if name == step_name(step) or name.startswith(f"{step_name(step)}-"):
                discard(root / part / name)


def mark_using(root: epath.PathLike, held: Iterable[int], *, owner: str) -> None:
    """Says which versions `owner` reads, or will after a restart: they are not deleted.

    Args:
      root: the shared folder.
      held: steps of the versions; replaces what the owner said before.
      owner: who, e.g. ``trainer``; a file name.
    """
    folder = local(root) / USING
    folder.mkdir(parents=True, exist_ok=True)
    replace_json({"steps": sorted(set(held))}, folder / f"{owner}.json")


def in_use(root: pathlib.Path) -> set[int]:
    """Steps of the versions that anybody uses.

    Raises:
      UserError: a mark cannot be read; nothing may be deleted then.
    """
    used: set[int] = set()
    for name in names(root / USING):
        if name.startswith("."):
            continue
        path = root / USING / name
        try:
            used.update(int(step) for step in json.loads(path.read_text())["steps"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: is damaged ({error}); delete it, its owner writes it anew"
            ) from None
    return used
