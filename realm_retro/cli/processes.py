"""One stage at a time: measured, interrupted together, alone in its workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from etils import epath

from realm_retro.cli import common
from realm_retro.errors import UserError

# Ctrl-C in a terminal reaches the process too; it gets this long to end by itself.
_GRACE_SECONDS = 2.0
# Long enough to save, then it is killed.
_END_SECONDS = 20.0


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
    stdout: IO[bytes] | None = None,
    companion: Companion | None = None,
) -> Usage:
    """Runs one process to its end and measures it.

    Args:
      command: program and arguments.
      environment: of the process; None for this one's.
      keep_open: a file descriptor that the process inherits.
      stdout: where its standard output goes; None for this one's.
      companion: what has to run beside it; when that fails for good, so does this.

    Raises:
      UserError: it failed; it has said why itself.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        pass_fds=() if keep_open is None else (keep_open,),
        stdout=stdout,
    )
    try:
        if companion:
            companion.start(failed=lambda: _end(process.pid))
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        if companion:
            companion.stop(patiently=True)
    except KeyboardInterrupt:
        if companion:
            companion.stop()
        time.sleep(_GRACE_SECONDS)
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        if companion:
            companion.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    if companion and companion.error:
        raise UserError(companion.error)
    if process.returncode:
        raise UserError(_failure(command, process.returncode))
    return Usage(seconds, megabytes(used.ru_maxrss))


class Companion:
    """A process that runs as long as a stage does.

    One that ends before the stage is started again: whatever the stage is, it goes on
    meanwhile. Only one that fails again and again is given up.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        tries: int = 3,
        pause_seconds: float = 5.0,
        grace_seconds: float = 5.0,
    ):
        """Nothing runs yet.

        Args:
          command: program and arguments.
          environment: of the process; None for this one's.
          tries: after so many failures it is given up.
          pause_seconds: before it is started again.
          grace_seconds: to end by itself when its stage has ended.
        """
        self._command, self._environment = command, environment
        self._tries, self._pause, self._grace = tries, pause_seconds, grace_seconds
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._pid: int | None = None
        self.peak_mb = 0.0
        self.error: str | None = None

    def start(self, *, failed: Callable[[], None]) -> None:
        """Starts it, and a thread that looks after it.

        Args:
          failed: called from that thread when the process is given up.
        """
        self._thread = threading.Thread(target=self._watch, args=(failed,))
        self._thread.start()

    def stop(self, *, patiently: bool = False) -> None:
        """Ends it and waits for that; may be called again.

        Args:
          patiently: give it the time to end by itself.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(self._grace if patiently else 0.0)
            self._signal(signal.SIGTERM)
            self._thread.join(_END_SECONDS)
            self._signal(signal.SIGKILL)
            self._thread.join()

    def _watch(self, failed: Callable[[], None]) -> None:
        failures = 0
        while not self._stopping.is_set():
            code = self._run_once()
            if self._stopping.is_set():
                return
            failures += code != 0
            if failures == self._tries:
                self.error = f"{_ending(self._command, code)}, {failures} times"
                failed()
                return
            if code:
                common.say(f"{_ending(self._command, code)}; it is started again")
            self._stopping.wait(self._pause)

    def _run_once(self) -> int:
        with self._lock:
            # Stopped or started: never started after it was stopped.
            if self._stopping.is_set():
                return 0
            process = subprocess.Popen(self._command, env=self._environment)
            self._pid = process.pid
        if hasattr(os, "waitid"):  # macOS's Python has it from 3.13 on
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            # Its number is another process's from `wait4` on: no signals any more.
            with self._lock:
                self._pid = None
        _, status, used = os.wait4(process.pid, 0)
        with self._lock:
            self._pid = None
        self.peak_mb = max(self.peak_mb, megabytes(used.ru_maxrss))
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode

    def _signal(self, number: int) -> None:
        with self._lock:
            if self._pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, number)


def _end(pid: int) -> None:
    """Asks a process that another thread waits for to end, and then makes it."""
    with contextlib.suppress(ProcessLookupError):  # it is gone
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + _END_SECONDS
        while time.monotonic() < until:
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


def megabytes(maxrss: int) -> float:
    """Of ``ru_maxrss``, whose unit depends on the system."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return maxrss * unit / 1e6


def _failure(command: Sequence[str], code: int) -> str:
    """What happened to a process, and what to do."""
    if code == -signal.SIGKILL:
        return f"{_ending(command, code)}; run the same command to resume"
    return _ending(command, code) + ("; run it again to resume" if code < 0 else "")


def _ending(command: Sequence[str], code: int) -> str:
    what = command[2] if command[1] == "-m" else command[0]
    if code == -signal.SIGKILL:
        return f"{what} was killed, perhaps for memory"
    if code < 0:
        return f"{what} ended by {signal.Signals(-code).name}"
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
