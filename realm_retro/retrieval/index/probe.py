"""Finds out whether ScaNN runs here, without the risk of going down with it.

ScaNN's compiled code needs AVX2: on an older processor the import or the first search
ends the whole process with an illegal instruction. So both are tried in a process of
their own.
"""

from __future__ import annotations

import functools
import signal
import subprocess
import sys

_TIMEOUT_SECONDS = 120

_TRIAL = """
import numpy, scann
vectors = numpy.random.default_rng(0).normal(size=(64, 8)).astype("float32")
builder = scann.scann_ops_pybind.builder(vectors, 4, "squared_l2")
index = builder.score_ah(2).reorder(16).build()
ids, _ = index.search_batched(vectors)
assert ids.shape == (64, 4), ids.shape
"""


@functools.cache
def scann_problem(trial: str = _TRIAL) -> str | None:
    """Why ScaNN cannot be used on this machine, or None where it can.

    Args:
      trial: the program that is tried, about half a second's work.
    """
    try:
        run = subprocess.run(
            [sys.executable, "-c", trial],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a trial search did not end within {_TIMEOUT_SECONDS} seconds"
    if run.returncode == 0:
        return None
    if run.returncode == -signal.SIGILL:
        return "this processor lacks instructions that ScaNN needs (AVX2)"
    if run.returncode < 0:
        return f"a trial search ended by signal {-run.returncode}"
    last_line = run.stderr.strip().rpartition("\n")[2]
    return last_line or f"a trial search ended with status {run.returncode}"
