"""Files written whole or not at all, and errors of the disk that name the file."""

from __future__ import annotations

import contextlib
import errno
import os
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
)


def there(path: epath.PathLike) -> bool:
    """Whether something is at `path`.

    Raises:
      PermissionError: it may not be known. `Path.exists` would say no, and what is
        there would be made anew or reported missing.
    """
    try:
        epath.Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary path; on a clean exit it becomes `path`, whole.

    After an error what was at `path` is still there. A pipe or a device is written to
    as it is.

    Raises:
      OSError: with the file's name, see `named_errors`.
    """
    final = epath.Path(path)
    if final.exists() and not final.is_file():
        yield final
        return
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
    """The number of the disk's error that an error of any kind tells of, if it does."""
    text = str(error)
    return next((code for code in _ERRORS if os.strerror(code) in text), None)


def flush(path: epath.PathLike) -> None:
    """Returns when the file's content is on the disk."""
    # Local files only: an object store's upload is durable when it returns.
    with contextlib.suppress(FileNotFoundError, ValueError):
        descriptor = os.open(os.fspath(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
