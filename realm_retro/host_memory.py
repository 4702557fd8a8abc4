"""Keeps the C allocator from giving large blocks back to the system and back again."""

from __future__ import annotations

import ctypes
import platform

# Names and numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def reuse_freed_blocks() -> bool:
    """Makes freed blocks stay with the process, so that their pages are not new again.

    XLA on CPU allocates its temporaries anew in each step. By default glibc maps a
    large block freshly from the system each time, and the kernel zeroes every page on
    its first touch: that can take longer than the product that is written there.

    Returns:
      Whether it could be done; only glibc has these settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 1 << 26),
    )
    return all([mallopt(name, value) == 1 for name, value in settings])
