"""Commands as processes of their own: measured, timed line by line, never left over."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from etils import epath

from realm_retro.cli import processes
from realm_retro.cli.benchmarks import tied
from realm_retro.errors import UserError

_SAMPLE_SECONDS = 0.02
_END_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one process used.

    Attributes:
      seconds: wall clock, from its start to its end.
      peak_mb: the most resident memory, MB.
      own_mb: of it the most that was its own, without the pages of files that it has
        mapped, which the system takes back when it needs them. None where the system
        does not tell.
    """

    seconds: float
    peak_mb: float
    own_mb: float | None


@dataclasses.dataclass(frozen=True)
class Line:
    """A line that a process said, and when: in seconds since it was started."""

    seconds: float
    text: str


class Peak:
    """The most memory that a process was seen to hold.

    The number that a parent gets when its child has ended is no help: it starts from
    what the parent itself held when the child was made.
    """

    def __init__(self):
        self.peak_mb, self.own_mb = 0.0, 0.0

    def look(self, pid: int) -> None:
        """Reads the kernel's account of the process, on Linux."""
        try:
            lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        # A process that has just ended has no memory, and none of these lines.
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        self.peak_mb = max(self.peak_mb, _megabytes(found.get("VmHWM", "0 kB")))
        self.own_mb = max(self.own_mb, _megabytes(found.get("RssAnon", "0 kB")))


def environment(
    cache: epath.PathLike | None = None, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a command; what the user has set stays as it is.

    Args:
      cache: where compiled programs are kept; nowhere if None.
      extra: what is set in any case.
    """
    defaults = {"TF_CPP_MIN_LOG_LEVEL": "2"}
    if cache is not None:
        defaults["JAX_COMPILATION_CACHE_DIR"] = os.fspath(cache)
    return {**defaults, **os.environ, **(extra or {})}


@contextlib.contextmanager
def started(
    command: Sequence[str],
    *,
    log: epath.PathLike,
    env: Mapping[str, str],
    cpus: Sequence[int] = (),
    stdout: int | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A command that runs as long as the block does.

    Args:
      command: its module, such as ``realm_retro.cli.train``, and its flags.
      log: what it says is added there.
      env: its environment.
      cpus: it is kept on these; on any where none are given.
      stdout: `subprocess.PIPE` for a caller that reads its standard output.
    """
    where = ",".join(map(str, cpus)) or tied.ANY
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", tied.__name__, where, *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output if stdout is None else stdout,
            stderr=output,
            text=True,
        )
    try:
        yield process
    finally:
        end(process)
        if process.stdout:
            process.stdout.close()


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and waits for that, also one that stands still."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def measured(
    command: Sequence[str], *, log: epath.PathLike, env: Mapping[str, str]
) -> Usage:
    """Runs a command to its end.

    Raises:
      UserError: it failed.
    """
    began, peak = time.monotonic(), Peak()
    with started(command, log=log, env=env) as process:
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            peak.look(process.pid)
            time.sleep(_SAMPLE_SECONDS)
    check(command, process, log)
    seconds = time.monotonic() - began
    if not peak.peak_mb:
        return Usage(seconds, processes.megabytes(used.ru_maxrss), None)
    return Usage(seconds, peak.peak_mb, peak.own_mb or None)


def timeline(
    command: Sequence[str], *, log: epath.PathLike, env: Mapping[str, str]
) -> list[Line]:
    """Runs a command to its end; what it said to standard output, and when.

    Raises:
      UserError: it failed.
    """
    began, lines = time.monotonic(), []
    with started(command, log=log, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(Line(time.monotonic() - began, line.rstrip("\n")))
        process.wait()
    try:
        check(command, process, log)
    finally:
        with open(log, "a") as output:
            _write_lines(output, lines)
    return lines


def first(lines: Sequence[Line], text: str) -> float:
    """When a text was first said.

    Raises:
      UserError: it never was.
    """
    for line in lines:
        if text in line.text:
            return line.seconds
    raise UserError(f"the command never said {text!r}, which is what was timed")


def check(
    command: Sequence[str], process: subprocess.Popen[str], log: epath.PathLike
) -> None:
    """Refuses a process that has failed.

    Raises:
      UserError: with the last line that it said.
    """
    if process.returncode:
        said = epath.Path(log).read_text().strip().splitlines()
        raise UserError(
            f"{command[0].rpartition('.')[2]} ended with status {process.returncode}:"
            f" {said[-1] if said else 'it said nothing'} (all of it: {log})"
        )


def _write_lines(output: IO[str], lines: Sequence[Line]) -> None:
    output.writelines(f"{line.seconds:9.2f} s  {line.text}\n" for line in lines)


def _megabytes(value: str) -> float:
    number, unit = value.split()
    assert unit == "kB"
    return int(number) * 1024 / 1e6
