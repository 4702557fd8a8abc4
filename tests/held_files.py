"""How much of some files this process holds in memory, as Linux tells."""

import pathlib
import re
import sys

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="as Linux tells")


def held(path):
    """Bytes of a file, or of the files of a folder, that are mapped and in memory."""
    found, ours = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(path) in line
        elif ours and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found
