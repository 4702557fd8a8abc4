"""Flags and signals of stages that several processes may share."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from absl import flags

from realm_retro.artifacts import Stage
from realm_retro.cli import common
from realm_retro.shards import Shard, Sharing, Work

JOIN = flags.DEFINE_boolean(
    "join",
    False,
    "Share the work with the processes that are at this stage already, or will be, on"
    " any host that sees the workdir. Start the same command with --join as often as"
    " you like.",
)
_LEASE_SECONDS = flags.DEFINE_float(
    "lease_seconds",
    60.0,
    "A process that was silent for so long loses its shard to another.",
    lower_bound=0.1,
)
_SIGTERM_STATUS = 143


@contextlib.contextmanager
def work(stage: Stage, shards: Sequence[Shard], *, label: str) -> Iterator[Work]:
    """This process's part in a stage; SIGTERM gives back what it holds, then ends it.

    Args:
      stage: opened to be shared, see `JOIN`.
      shards: all of them.
      label: the stage's name in its report.
    """
    sharing = Sharing(lease_seconds=_LEASE_SECONDS.value)
    with (
        _ended_by_sigterm(),
        Work(
            stage,
            shards,
            label=label,
            unit="chunks",
            sharing=sharing,
            report=common.say,
        ) as mine,
    ):
        yield mine


def say_own_part(work: Work, *, label: str) -> None:
    """Says what this process did, where another wrote the manifest."""
    common.say(
        f"{label}: finished; this process made {work.totals.shards:,} of"
        f" {len(work.shards):,} shards, {work.totals.rows:,} chunks"
    )


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    # Python takes signals in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_SIGTERM_STATUS))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
