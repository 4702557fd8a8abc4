"""Real processes share a stage: killed, stopped, continued, joined late, ended."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_bert
import tiny_workdir
import toy_shards as toy
from etils import epath

from realm_retro import artifacts
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.retrieval.embeddings import Embeddings

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

LEASE = 2.0  # longer than a busy machine keeps a heart from beating
PATIENCE = 240.0
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Chunks and an encoder, and the embeddings that one process makes of them."""
    folder = tmp_path_factory.mktemp("shared")
    tiny_workdir.write_chunks(folder / "chunks", documents=100)
    tiny_bert.write(folder / "encoder")
    (folder / "alone").mkdir()
    tiny_workdir.link(folder / "chunks", folder / "alone")
    command = [sys.executable, toy.__file__, str(folder / "alone")]
    subprocess.run(
        [*command, str(folder / "encoder"), "alone"], check=True, env=ENVIRONMENT
    )
    return folder


@pytest.fixture
def workdir(shared, tmp_path):
    return tiny_workdir.link(shared / "chunks", tmp_path)


@pytest.fixture
def start(shared, workdir):
    """Starts processes; none outlives the test."""
    running = []

    def run(name, *words, command=None):
        process = subprocess.Popen(
            command
            or [
                *(sys.executable, toy.__file__, str(workdir)),
                *(str(shared / "encoder"), name, *words),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def until(condition, *processes):
    """Waits for something that processes do; they must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def end(process, status=0):
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, output
    return output


def finished(workdir):
    """The names of the shards that are finished."""
    found = (workdir / "embeddings" / ".progress").glob("*.file.json")
    return {path.name.removesuffix(".file.json") for path in found}


def shards_by(output, total):
    """How many shards a process says that it made."""
    for line in output.splitlines():
        if f" of {total:,} shards" in line:
            return int(line.split("this process made ")[1].split(" of")[0])
    assert "vectors of 16 numbers" in output, output
    return None  # It wrote the manifest.


def assert_as_alone(shared, workdir):
    alone = Embeddings.open(shared / "alone" / "embeddings")
    found = Embeddings.open(workdir / "embeddings")
    assert found.manifest.files == alone.manifest.files
    assert found.fingerprint == alone.fingerprint
    assert found.manifest.meta["texts"] == len(ChunkStore.open(workdir / "chunks"))
    hidden = [p.name for p in (workdir / "embeddings").iterdir() if p.name[0] == "."]
    assert not hidden
    return len(found.manifest.files)


def test_three_share_one_is_killed_and_one_comes_late(shared, workdir, start):
    slow = start("slow", "--join", "pause=0.05")
    killed = start("killed", "--join", "hold=5")
    until((workdir / "killed.in").exists, slow, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    inodes = {
        name: (workdir / "embeddings" / name).stat().mtime for name in finished(workdir)
    }
    config = workdir / "config.py"
    values = toy.config_of(shared / "encoder").to_dict()
    config.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({values!r})\n"
    )
    late = start(
        "late",
        command=[
            *(sys.executable, "-m", "realm_retro.cli.embed", f"--config={config}"),
            *(f"--workdir={workdir}", "--join"),
        ],
    )
    outputs = [end(slow), end(late)]
    total = assert_as_alone(shared, workdir)
    # What was finished when one was killed was not made again.
    for name, stamp in inodes.items():
        assert (workdir / "embeddings" / name).stat().mtime == stamp
    made = [shards_by(output, total) for output in outputs]
    assert made.count(None) == 1, outputs
    assert max(m for m in made if m is not None) > 0, "the late one had its share"
    assert "by 3 processes" in "".join(outputs) or inodes == {}
    # The bar of each counts what all have made.
    rows = f"{len(ChunkStore.open(workdir / 'chunks')):,}"
    assert all("100%" in output for output in outputs), rows


def test_a_sleeper_wakes_when_all_is_over(shared, workdir, start):
    # The other must come before the lease has expired, or it has nothing to wait for.
    seconds = 5 * LEASE
    lease = f"--lease_seconds={seconds}"
    sleeper = start("sleeper", "--join", "hold=3", lease)
    until((workdir / "sleeper.in").exists, sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    other = start("other", "--join", lease)
    assert "waiting for" in end(other)
    manifest = (workdir / "embeddings" / artifacts.MANIFEST).read_bytes()
    (workdir / "sleeper.go").touch()
    sleeper.send_signal(signal.SIGCONT)
    output = end(sleeper)
    assert f"this one was silent for more than {seconds:g} s" in output
    assert "embeddings: finished; this process made" in output
    assert (workdir / "embeddings" / artifacts.MANIFEST).read_bytes() == manifest
    assert_as_alone(shared, workdir)


def test_a_sleeper_wakes_while_another_is_at_work(shared, workdir, start):
    lease = f"--lease_seconds={LEASE}"
    sleeper = start("sleeper", "--join", "hold=1", lease)
    until((workdir / "sleeper.in").exists, sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * LEASE)
    other = start("other", "--join", "hold=9", lease)
    until((workdir / "other.in").exists, other)
    first = min(finished(workdir))
    stamp = (workdir / "embeddings" / first).stat().mtime
    (workdir / "sleeper.go").touch()
    sleeper.send_signal(signal.SIGCONT)
    until(lambda: "went to another" in sleeper.stdout.readline(), sleeper)
    (workdir / "other.go").touch()
    end(other)
    end(sleeper)
    assert (workdir / "embeddings" / first).stat().mtime == stamp
    assert_as_alone(shared, workdir)


def test_sigterm_gives_shards_back_at_once(shared, workdir, start):
    leaver = start("leaver", "--join", "hold=3", "--lease_seconds=3600")
    until((workdir / "leaver.in").exists, leaver)
    leaver.terminate()
    end(leaver, 143)
    output = end(start("other", "--join", "--lease_seconds=3600"))
    assert "waiting for" not in output
    assert_as_alone(shared, workdir)


def test_a_second_one_is_refused_until_it_joins(shared, workdir, start):
    first = start("first", "hold=2")
    until((workdir / "first.in").exists, first)
    assert "or share its work with --join" in end(start("second"), 1)
    joined = start("joined", "--join")
    total = -(-len(ChunkStore.open(epath.Path(workdir) / "chunks")) // toy.SHARD_SIZE)
    # The first holds the shard that it embeds, and the one that it reads meanwhile.
    until(lambda: len(finished(workdir)) == total - 2, first, joined)
    (workdir / "first.go").touch()
    outputs = [end(first), end(joined)]
    assert sorted(shards_by(o, total) is None for o in outputs) == [False, True]
    assert "by 2 processes" in "".join(outputs)
    assert_as_alone(shared, workdir)
