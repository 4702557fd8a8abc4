"""The few atomic moves on a folder that several processes share.

Whatever appears under its final name is whole: a file is written under a private name
and linked, a directory is filled under a private name and renamed. Both moves are
atomic and exclusive on a POSIX file system, a network one included. A bucket has
neither.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

from realm_retro import disk

TRASH = ".trash-"
# What file systems without hard links answer.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}


def local(path: epath.PathLike) -> pathlib.Path | None:
    """The same path for this module; None in a bucket."""
    text = os.fspath(path)
    return None if "://" in text else pathlib.Path(text)


def names(folder: pathlib.Path) -> list[str]:
    """The names in `folder`; none where it is not there (yet, or any more)."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def private_file(folder: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Yields a path for a file that no other process writes; it is gone at the end."""
    path = folder / f".{name}.{secrets.token_hex(6)}"
    try:
        with disk.named_errors(folder / name):
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
    trash = path.parent / f"{TRASH}{secrets.token_hex(6)}"
    # Another may have been quicker.
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


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
