"""Refresh by real processes that are killed, stopped and continued by real signals."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_refresh as toy

from realm_retro import artifacts
from realm_retro.retrieval import refresh

pytestmark = pytest.mark.multiprocess

LEASE = 1.5  # longer than a busy machine keeps a heart from beating
PATIENCE = 60.0


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "refresh"
    refresh.begin_training(root)
    return root


@pytest.fixture
def start(root):
    """Starts workers; none outlives the test."""
    running = []

    def run(name, **options):
        words = [f"{key}={value}" for key, value in options.items()]
        process = subprocess.Popen(
            [sys.executable, toy.__file__, str(root), name, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
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
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never happened"
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    return found


def publish(root, step):
    return refresh.publish_snapshot(root, step, toy.arrays(step), parents=toy.PARENTS)


def version_of(root, step):
    """What a trainer does that trusts nothing; None where it is not there yet."""
    found = refresh.newest_version(root, parents=toy.PARENTS)
    return found if found is not None and found.step >= step else None


def assert_whole(version):
    vectors = refresh.load_vectors(version)[:]
    np.testing.assert_array_equal(vectors, toy.expected(version.step))


def ended(root, *processes):
    refresh.end_training(root)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def shards_by(output):
    """How many shards a worker says that it published."""
    last = [line for line in output.splitlines() if "versions published" in line][-1]
    return int(last.split("refresh: ")[1].split(" shards")[0])


def test_two_workers_share_a_version(root, start):
    workers = [start(name, pause=0.05) for name in "ab"]
    for worker in workers:
        assert "worker" in worker.stdout.readline()  # both are up
    publish(root, 100)
    assert_whole(until(lambda: version_of(root, 100), *workers))
    made = [shards_by(output) for output in ended(root, *workers)]
    assert sum(made) == toy.TARGET.num_shards
    assert min(made) > 0


def test_a_worker_killed_in_the_middle_of_a_shard(root, start, tmp_path):
    publish(root, 100)
    killed = start("killed", hold=8)
    until((tmp_path / "killed.in").exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = sorted((root / "building").rglob("vectors-*.npy"))
    inodes = {path.name: path.stat().st_ino for path in done}
    assert len(done) == 2
    assert version_of(root, 0) is None

    other = start("other")
    version = until(lambda: version_of(root, 100), other)
    assert_whole(version)
    # What was finished is not made again: the files are the same ones.
    for name, inode in inodes.items():
        assert os.stat(version.manifest.path(name)).st_ino == inode
    (output,) = ended(root, other)
    assert shards_by(output) == toy.TARGET.num_shards - 2


def test_a_sleeper_finds_its_lease_lost(root, start, tmp_path):
    publish(root, 100)
    sleeper = start("sleeper", hold=0, lease=LEASE)
    until((tmp_path / "sleeper.in").exists, sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * LEASE)
    last = (toy.TARGET.num_shards - 1) * toy.SHARD_ROWS
    other = start("other", hold=last, lease=LEASE)
    until((tmp_path / "other.in").exists, other)
    first = next((root / "building").rglob("vectors-00000-*.npy")).stat()

    (tmp_path / "sleeper.go").touch()
    sleeper.send_signal(signal.SIGCONT)
    until(lambda: "went to another" in sleeper.stdout.readline(), sleeper)
    again = next((root / "building").rglob("vectors-00000-*.npy")).stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert version_of(root, 0) is None, "the other still has the last shard"

    (tmp_path / "other.go").touch()
    assert_whole(until(lambda: version_of(root, 100), sleeper, other))
    outputs = ended(root, sleeper, other)
    assert "1 shards lost to another after silence" in outputs[0]
    assert [shards_by(output) for output in outputs] == [0, toy.TARGET.num_shards]


def test_a_sleeper_wakes_after_the_version_was_published(root, start, tmp_path):
    publish(root, 100)
    sleeper = start("sleeper", hold=4)
    until((tmp_path / "sleeper.in").exists, sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    other = start("other")
    version = until(lambda: version_of(root, 100), other)
    manifest = (version.manifest.directory / artifacts.MANIFEST).read_bytes()

    (tmp_path / "sleeper.go").touch()
    sleeper.send_signal(signal.SIGCONT)
    publish(root, 200)  # both are needed again, and able
    assert_whole(until(lambda: version_of(root, 200), sleeper, other))
    again = refresh.open_version(root, 100)
    assert_whole(again)
    assert (again.manifest.directory / artifacts.MANIFEST).read_bytes() == manifest
    ended(root, sleeper, other)


def test_newest_snapshot_wins_between_shards(root, start, tmp_path):
    publish(root, 100)
    worker = start("worker", hold=8)
    until((tmp_path / "worker.in").exists, worker)
    publish(root, 200)
    (tmp_path / "worker.go").touch()
    assert_whole(until(lambda: version_of(root, 200), worker))
    assert os.listdir(root / "versions") == ["step-00000200"]
    (output,) = ended(root, worker)
    assert "step 100 is outdated: dropped with 3 of 6 shards" in output
    assert "1 outdated versions dropped" in output


def test_a_damaged_snapshot_is_refused_and_the_next_one_taken(root, start):
    snapshot = publish(root, 100)
    path = snapshot.manifest.path("params.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    worker = start("worker")
    line = ""
    while "is damaged" not in line:
        line = worker.stdout.readline()
        assert line, "the worker ended"
    assert "params.safetensors" in line
    assert "waiting for another snapshot" in line
    assert version_of(root, 0) is None
    publish(root, 200)
    assert_whole(until(lambda: version_of(root, 200), worker))
    assert "1 snapshots refused" in ended(root, worker)[0]


def test_sigterm_gives_the_shard_back_at_once(root, start, tmp_path):
    publish(root, 100)
    leaver = start("leaver", hold=0, lease=3600)
    until((tmp_path / "leaver.in").exists, leaver)
    leaver.terminate()
    output, _ = leaver.communicate()
    assert "0 shards with 0 vectors" in output
    other = start("other", lease=3600)
    assert_whole(until(lambda: version_of(root, 100), other))
    ended(root, other)


def test_workers_end_without_a_trainer(root, start):
    worker = start("worker", idle=0.3)
    output, _ = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 0
    assert "nothing to do for 0 s: this worker ends" in output


def test_workers_of_other_passages_do_not_mix(root, start):
    refresh.publish_snapshot(root, 100, toy.arrays(100), parents={"passages": "b" * 64})
    worker = start("worker")
    output, _ = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 1
    assert "refused: " in output
    assert "is of a training over passages bbbbbbbbbbbb, this worker has aaaa" in output


def test_random_kills_never_show_half_a_version(root, start):
    draw = random.Random(0)
    workers = [start(f"w{i}", pause=0.02) for i in range(2)]
    swapper = refresh.Swapper(root, parents=toy.PARENTS, poll_seconds=0, verify=True)
    seen = []

    def looks(seconds, step):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if version := swapper.poll(step):
                assert_whole(version)
                seen.append(version.step)
            time.sleep(0.002)

    for number in range(1, 5):
        publish(root, 100 * number)
        looks(draw.uniform(0.05, 1.0), 100 * number)
        victim = draw.randrange(2)
        workers[victim].send_signal(signal.SIGKILL)
        workers[victim].communicate()
        workers[victim] = start(f"w{number}{victim}", pause=0.02)
    deadline = time.monotonic() + PATIENCE
    while not seen or seen[-1] < 400:
        assert time.monotonic() < deadline
        looks(0.05, 400)
    assert seen == sorted(set(seen))
    ended(root, *workers)
    # Nothing is left of the killed ones' work but what no one may delete.
    assert not list((root / "building").iterdir())
    assert not [n for n in os.listdir(root / "versions") if n.startswith(".")]


def test_a_publisher_sleeps_beyond_its_lease(root, start):
    """Stopped with all shards linked into a version that does not have its name yet."""
    sleeper = start("sleeper", lease=LEASE)
    for step in range(100, 10_000, 100):  # until it is stopped in time
        publish(root, step)
        until(lambda: any((root / "versions").glob(".step-*")), sleeper)
        sleeper.send_signal(signal.SIGSTOP)
        if any((root / "versions").glob(".step-*/*.npy")):
            break
        sleeper.send_signal(signal.SIGCONT)
        until(lambda step=step: version_of(root, step), sleeper)
    assert version_of(root, step) is None

    other = start("other", lease=LEASE)
    version = until(lambda: version_of(root, step), other)
    manifest = version.manifest.directory / artifacts.MANIFEST
    before = manifest.read_bytes(), os.stat(manifest).st_ino
    sleeper.send_signal(signal.SIGCONT)
    published = sum(versions_by(output) for output in ended(root, sleeper, other))
    assert published == step // 100
    assert_whole(refresh.open_version(root, step))
    assert (manifest.read_bytes(), os.stat(manifest).st_ino) == before
    assert not list((root / "versions").glob(".*"))


def versions_by(output):
    """How many versions a worker says that it published."""
    last = [line for line in output.splitlines() if "versions published" in line][-1]
    return int(last.split(" versions published")[0].split()[-1])


class Witness:
    """Sees every shard that is placed, and that none is placed twice."""

    def __init__(self, root):
        self.root, self.seen = root, {}

    def look(self):
        for path in self.root.glob("building/*/vectors-*.npy"):
            try:
                status = path.stat()
            except FileNotFoundError:  # the version is published
                continue
            placed = status.st_ino, status.st_mtime_ns
            assert self.seen.setdefault(path, placed) == placed, f"{path}: twice"


def test_random_pauses_and_second_starts_lose_and_double_nothing(root, start):
    """Twenty pauses, most of them beyond the lease, of workers started two by two."""
    draw, witness, lease = random.Random(2), Witness(root), 0.4
    workers = [start("twin", pause=0.05, lease=lease) for _ in range(4)]
    for worker in workers:
        assert "worker" in worker.stdout.readline()  # all are up
    asleep, pauses, step = {}, 0, 0

    def wake(now):
        for worker in [worker for worker, end in asleep.items() if end <= now]:
            worker.send_signal(signal.SIGCONT)
            del asleep[worker]

    deadline = time.monotonic() + 4 * PATIENCE
    while pauses < 20:
        step += 100
        publish(root, step)
        nap = 0.0
        while not version_of(root, step):
            now = time.monotonic()
            assert now < deadline
            witness.look()
            wake(now)
            awake = [worker for worker in workers if worker not in asleep]
            if now >= nap and len(awake) > 1:
                victim = draw.choice(awake)
                victim.send_signal(signal.SIGSTOP)
                asleep[victim] = now + draw.uniform(0.5, 4) * lease
                pauses, nap = pauses + 1, now + draw.uniform(0, 0.3)
            time.sleep(0.002)
        witness.look()
        assert_whole(refresh.open_version(root, step))
    wake(float("inf"))
    outputs = ended(root, *workers)
    # Each shard of each version was placed once, by whoever it was.
    made = sum(shards_by(output) for output in outputs)
    assert made == step // 100 * toy.TARGET.num_shards
    assert sum(versions_by(output) for output in outputs) == step // 100
    assert not list((root / "building").iterdir())
    lost = sum("went to another" in output for output in outputs)
    print(f"{pauses} pauses, {step // 100} versions, {lost} workers lost a shard")
