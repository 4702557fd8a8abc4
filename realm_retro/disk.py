"""Files written whole or not at all, and errors of the disk that name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from etils import epath

from realm_retro.errors import UserError

_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
)
# What a reader may meet on a disk that is well: a part of a folder is gone.
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def there(path: epath.PathLike) -> bool:
    """Whether something is at `path`.

    Raises:
      PermissionError: it may not be known. `Path.exists` would say no, and what is
        there would be made anew or reported missing.
    """
    try:
        size(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(path: epath.PathLike) -> int:
    """Bytes of a file.

    Raises:
      OSError: it is not there, or may not be known.
    """
    if "://" in os.fspath(path):
        return epath.Path(path).stat().length
    # epath asks for the owner's name too, and fails where he has none, as containers'
    # users often have.
    return os.stat(path).st_size


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary path; on a clean exit it becomes `path`, whole.

    After an error what was at `path` is still there. Where it is a link, the file that
    it leads to is replaced. A pipe, a device and the file that standard output goes to
    are written to as they are.

    Raises:
      OSError: with the file's name, see `named_errors`.
    """
    final = epath.Path(path)
    if _is_stream(final):
        yield final
        return
    if os.path.islink(final):
        final = epath.Path(os.path.realpath(final))
    temporary = final.parent / f"{final.name}.tmp"
    try:
        with named_errors(final):
            yield temporary
            flush(temporary)
            temporary.replace(final)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _is_stream(path: epath.Path) -> bool:
    """Whether something is here that must keep its place.

    That is what is no file, or the file that this process' output goes to, which
    /dev/stdout leads to.
    """
    if "://" in os.fspath(path):
        return False
    try:
        # Not epath's `is_file`: for that one a device is a file.
        here = os.stat(path)
    except OSError:
        return False
    return not stat.S_ISREG(here.st_mode) or any(
        os.path.samestat(here, there) for there in _outputs()
    )


def _outputs() -> Iterator[os.stat_result]:
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            yield os.fstat(descriptor)


@contextlib.contextmanager
def named_errors(path: epath.PathLike) -> Iterator[None]:
    """Makes errors of the disk an OSError that names a file.

    Libraries tell of a full disk in errors of all kinds, or do not say which file.

    Raises:
      OSError: as the block did, or in the place of what a library raised.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    except Exception as error:
        code = error_code(error)
        if code is None or isinstance(error, UserError):
            raise
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def error_code(error: BaseException) -> int | None:
    """The number of the disk's error that an error, or its cause, tells of, if any."""
    text, cause = str(error), error.__cause__
    while cause is not None:
        text, cause = f"{text} {cause}", cause.__cause__
    return next((code for code in _ERRORS if os.strerror(code) in text), None)


def tells_damage(error: BaseException) -> bool:
    """Whether an error of reading, within `named_errors`, tells of the file's content.

    The others tell of the disk or of the machine (no memory, too many open files): the
    file may be whole, and nobody should be told to delete it.
    """
    if isinstance(error, OSError) and not isinstance(error, _GONE):
        return not (error.errno or error_code(error))
    return not isinstance(error, MemoryError)


def flush(path: epath.PathLike) -> None:
    """Returns when the file's content is on the disk."""
    # Local files only: an object store's upload is durable when it returns.
    with contextlib.suppress(FileNotFoundError, ValueError):
        descriptor = os.open(os.fspath(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
