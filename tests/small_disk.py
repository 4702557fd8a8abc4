"""Disks of a few kilobytes, full ones, and ones that may only be read."""

import contextlib
import os
import pathlib
import shutil
import subprocess

import pytest


@contextlib.contextmanager
def mounted(folder, size):
    """A disk of `size` bytes at `folder`; the test is skipped where none can be had."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here (it takes root)")
    try:
        yield folder
    finally:
        # Lazily: an array of it may still be memory-mapped.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder, mode):
    """Makes a mounted disk ``ro`` or ``rw``."""
    command = ["mount", "-o", f"remount,{mode}", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def free_bytes(folder):
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def leave(folder, free):
    """Fills a disk but for so many bytes; returns the file to delete."""
    ballast = pathlib.Path(folder) / "ballast"
    ballast.write_bytes(bytes(max(0, free_bytes(folder) - free)))
    return ballast


@contextlib.contextmanager
def as_nobody():
    """Root may write anywhere; this is somebody who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
