"""One process at a time: measured, interrupted together, alone in its workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from realm_retro.cli import common
from realm_retro.errors import UserError

# Ctrl-C in a terminal reaches the process too; it gets this long to end by itself.
_GRACE_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one process used: wall-clock seconds, and peak resident memory in MB."""

    seconds: float
    peak_mb: float


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    keep_open: int | None = None,
) -> Usage:
    """Runs one process to its end and measures it.

    Args:
      command: program and arguments.
      environment: of the process; None for this one's.
      keep_open: a file descriptor that the process inherits.

    Raises:
      UserError: it failed; it has said why itself.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, pass_fds=() if keep_open is None else (keep_open,)
    )
    try:
        _, status, used = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        time.sleep(_GRACE_SECONDS)
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(_failure(command, process.returncode))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return Usage(time.monotonic() - started, used.ru_maxrss * unit / 1e6)


def _failure(command: Sequence[str], code: int) -> str:
    what = command[2] if command[1] == "-m" else command[0]
    if code == -signal.SIGKILL:
        return f"{what} was killed, perhaps for memory; run the same command to resume"
    if code < 0:
        return f"{what} ended by {signal.Signals(-code).name}; run it again to resume"
    return f"{what} failed (exit status {code}) for the reason above"


@contextlib.contextmanager
def only_one(workdir: epath.Path) -> Iterator[int | None]:
    """Waits until no other run, nor a stage that outlived its run, uses the workdir.

    Yields a file descriptor that holds the lock in every process that inherits it;
    None where the workdir or the system has no locks, such as in a bucket.
    """
    try:
        import fcntl

        cache = workdir / ".cache"
        cache.mkdir(exist_ok=True)
        descriptor = os.open(os.fspath(cache / "lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except (ImportError, FileNotFoundError):
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            common.say(f"Waiting for another run that is at work in {workdir}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that it too is passed on to the process."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
