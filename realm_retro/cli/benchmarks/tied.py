"""Runs a module in a process that ends with the one that started it.

  python -m realm_retro.cli.benchmarks.tied CPUS MODULE [FLAG …]

CPUS is a list such as ``2,3`` that the process is kept on from its first thread, or
``any``. On Linux the kernel ends it when its parent is gone, however that ended: not
even a process that stands still is left behind.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

ANY = "any"
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def main() -> None:
    """See the module docstring."""
    _, cpus, module, *flags = sys.argv
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if cpus != ANY:
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
