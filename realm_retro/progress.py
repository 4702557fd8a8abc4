"""Progress bars with rate and time left, readable in a terminal and in a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm


def bar(*, total: int | None, unit: str, label: str, initial: int = 0) -> tqdm:
    """A bar that counts `unit`; a log file gets a line every ten seconds.

    Args:
      total: how many there will be; None where it is not known.
      unit: what is counted, e.g. ``chunks``.
      label: the stage's name, shown first.
      initial: how many were done by an earlier, interrupted run.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        unit=f" {unit}",
        desc=label,
        initial=initial,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        mininterval=0.2 if terminal else 10.0,
        ascii=None if terminal else " #",
        unit_scale=True,
        smoothing=0.1,
        file=sys.stderr,
    )
