"""Files that appear whole, and the disk's errors in whatever words."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import small_disk

from realm_retro import disk
from realm_retro.arrays import write_npy
from realm_retro.errors import UserError


def test_what_was_there_stays_until_the_new_is_whole(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def write_half():
        with disk.replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_half()
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"
    with disk.replacing(path) as temporary:
        temporary.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "new"


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    """So is a device. None of /dev: a mistake would replace it for all processes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with disk.replacing(pipe) as path:
            path.write_text("through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    file, link = tmp_path / "folder" / "file", tmp_path / "link"
    link.symlink_to(file)
    for text in ("first", "second"):  # nothing is there at first
        with disk.replacing(link) as temporary:
            temporary.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert link.is_symlink()
        assert file.read_text() == text
    assert [path.name for path in file.parent.iterdir()] == ["file"]


OUTPUT = """
import os, sys
from realm_retro import disk

print("before", flush=True)
with disk.replacing(sys.argv[1]) as path, path.open("a") as file:
    file.write("report\\n")
os.lseek(1, 0, os.SEEK_END)
print("after", flush=True)
"""


def test_a_link_to_the_output_is_written_to_as_it_is(tmp_path):
    """Nothing printed is lost, as it were if another file took the output's place."""
    link, output = tmp_path / "stdout", tmp_path / "output"
    # Not /dev/stdout, which a mistake would replace for all.
    link.symlink_to("/proc/self/fd/1")
    if not link.exists():
        pytest.skip("this system has no /proc")
    with output.open("w") as file:
        subprocess.run([sys.executable, "-c", OUTPUT, link], stdout=file, check=True)
    assert link.is_symlink()
    assert output.read_text() == "before\nreport\nafter\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("Error writing x: No space left on device"), errno.ENOSPC),
        (ValueError("Disk quota exceeded [OS error 122]"), errno.EDQUOT),
        (RuntimeError("PERMISSION_DENIED: Permission denied"), errno.EACCES),
        (ValueError("Read-only file system"), errno.EROFS),
        (ValueError("Error reading x: Input/output error"), errno.EIO),
        (RuntimeError("Stale file handle"), errno.ESTALE),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EIO, "broken"), errno.EIO),
    ],
)
def test_errors_of_the_disk_name_the_file(error, code):
    with pytest.raises(OSError) as raised, disk.named_errors("shard-3.npy"):  # noqa: PT011
        raise error
    assert raised.value.errno == code
    assert raised.value.filename == "shard-3.npy"


def test_a_file_that_is_named_stays_the_one():
    with pytest.raises(OSError, match="other") as raised, disk.named_errors("shard"):
        raise OSError(errno.ENOSPC, "full", "other")
    assert raised.value.filename == "other"


@pytest.mark.parametrize("kind", [UserError, KeyError, RuntimeError])
def test_other_errors_stay_what_they_are(kind):
    text = "No space left on device" if kind is UserError else "no room"
    with pytest.raises(kind, match=text), disk.named_errors("x"):
        raise kind(text)


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (ValueError("a bad block"), True),
        (FileNotFoundError(errno.ENOENT, "gone"), True),
        (OSError("a library says that it is truncated"), True),
        (OSError(errno.EIO, "broken"), False),
        (OSError(errno.EMFILE, "too many"), False),
        (OSError("write: No space left on device"), False),
        (MemoryError(), False),
    ],
)
def test_only_what_a_file_holds_is_damage(error, damage):
    assert disk.tells_damage(error) == damage


def test_an_owner_without_a_name_is_no_error(tmp_path, monkeypatch):
    """In a container the user's number may stand in no list of users."""
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    (tmp_path / "file").write_text("four")
    assert disk.there(tmp_path / "file")
    assert disk.size(tmp_path / "file") == 4
    assert not disk.there(tmp_path / "none")


def test_nobody_is_told_that_a_hidden_file_is_missing(tmp_path):
    (tmp_path / "file").write_text("x")
    assert disk.there(tmp_path / "file")
    assert not disk.there(tmp_path / "none")
    assert not disk.there(tmp_path / "file" / "none")
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    tmp_path.chmod(0o700)
    with small_disk.as_nobody(), pytest.raises(PermissionError):
        disk.there(tmp_path / "file")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 5), np.int64),
        np.zeros(3, [("document", "<i4"), ("bytes", "<i8", (2,))]),
        np.array([True, False]),
    ],
)
def test_an_array_is_written_as_numpy_writes_it(tmp_path, array):
    write_npy(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", np.ascontiguousarray(array))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


TOO_LARGE = """
import resource
import numpy as np
from realm_retro import artifacts
from realm_retro.arrays import write_npy
from realm_retro.cli import common

def main(config, workdir):
    stage = artifacts.Stage.open(
        workdir, kind="embeddings", format_version=1, config={}, parents={},
        made_by="realm_retro.cli.embed")
    with stage.write("vectors.npy") as path:
        write_npy(path, np.zeros(100_000))

# Here, not in a fork of the tests' process, which has threads.
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
common.run(main, name="embed", required=("workdir",))
"""


def test_a_limit_of_file_sizes_is_one_line(tmp_path):
    """numpy's own writing tells of it without a number, and so of a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", TOO_LARGE, f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        f"embed: error: {tmp_path}/vectors.npy: the file would"
    )
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("vectors*"))
