"""A training and its refresh workers as processes; any of them may be killed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_pretraining as toy
from etils import epath

from realm_retro.cli import refresh_index, towers
from realm_retro.retrieval import refresh

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

STEPS, EVERY, SAVED_EVERY = 150, 5, 10
PAUSE = 0.1  # seconds of a step, so that workers have something to be in time for
PATIENCE = 120.0


@pytest.fixture
def config(tmp_path):
    toy.write_rivers(tmp_path, documents=60)
    return toy.make_config(
        tmp_path,
        pretrain={"refresh": "workers"},
        refresh={"every": EVERY, "lease_seconds": 3.0, "poll_seconds": 0.05},
        train={"steps": STEPS, "checkpoint_every": SAVED_EVERY},
    )


@pytest.fixture
def workdir(config, tmp_path):
    return toy.prepared(config, epath.Path(tmp_path / "work"))


@pytest.fixture
def start(config, workdir, tmp_path):
    """Starts a process; none outlives the test. Its output goes to a file."""
    running = []

    def run(name):
        path = toy.write_config(tmp_path / "config.py", config)
        command = [sys.executable, toy.__file__, str(path), str(workdir), str(PAUSE)]
        if name != "trainer":
            command = [sys.executable, "-m", "realm_retro.cli.refresh_index"]
            command += [f"--config={path}", f"--workdir={workdir}"]
        output = (tmp_path / f"{name}{len(running)}.txt").open("w+")
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **toy.quick(tmp_path), "JAX_NUM_CPU_DEVICES": "1"},
        )
        process.said = lambda: output.seek(0) or output.read()
        running.append((process, output))
        return process

    yield run
    for process, output in running:
        if process.poll() is None:
            process.kill()
        process.wait()
        output.close()


def until(condition, *processes):
    """Waits for something that processes do; they must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        for process in processes:
            assert process.poll() is None, process.said()
        assert time.monotonic() < deadline, [process.said() for process in processes]
        time.sleep(0.01)
    return found


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def versions(root):
    return sorted(int(path.name[5:]) for path in root.glob("versions/step-*"))


def has_lease(root, process):
    """Whether the worker is in the middle of a shard."""
    for path in root.glob("building/*/leases/shard-*.json"):
        number = path.name.removeprefix("shard-")[:5]
        try:
            mine = f"-{process.pid}-" in json.loads(path.read_text())["owner"]
            if mine and not list(path.parent.parent.glob(f"vectors-{number}-*.npy")):
                return True
        except (FileNotFoundError, ValueError):
            continue
    return False


def step_of(config, workdir):
    """How far the training has logged."""
    path = toy.run_dir(config, workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def checkpoint_of(config, workdir):
    """The newest whole checkpoint."""
    folder = toy.run_dir(config, workdir) / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def assert_of_its_snapshot(config, workdir, step):
    """A version holds all passages, embedded with the snapshot of its step."""
    root = refresh_index.folder(config, workdir)
    version = refresh.open_version(root, step)  # checksums too
    arrays = refresh.open_snapshot(root, step).arrays()
    store = towers.open_store(config, workdir)
    wanted = towers.passage_embedder(config, workdir)(arrays)(0, len(store))
    np.testing.assert_allclose(refresh.load_vectors(version)[:], wanted, atol=1e-4)


def test_kills_of_workers_and_of_the_trainer(config, workdir, start):
    root = refresh_index.folder(config, workdir)
    trainer = start("trainer")
    until(lambda: step_of(config, workdir) > EVERY, trainer)

    # A worker dies in the middle of a shard, the other goes on.
    first, second = start("worker"), start("worker")
    until(lambda: has_lease(root, first), trainer, first, second)
    kill(first)
    before = versions(root)[-1]
    until(lambda: versions(root)[-1] > before, trainer, second)

    # All workers dead: the training goes on with the index that it has.
    kill(second)
    at = step_of(config, workdir)
    until(lambda: step_of(config, workdir) > at + 2 * EVERY, trainer)
    alone = versions(root)[-1]
    at = step_of(config, workdir)
    until(lambda: step_of(config, workdir) > at + EVERY, trainer)
    assert versions(root)[-1] == alone

    # The trainer dies too, and goes on from its checkpoint with a new worker.
    saved = checkpoint_of(config, workdir)
    until(lambda: checkpoint_of(config, workdir) > saved, trainer)
    kill(trainer)
    saved = checkpoint_of(config, workdir)
    kept = toy.records(config, workdir)[:saved]
    assert [record["step"] for record in kept] == list(range(1, saved + 1))
    half = root / "versions" / f".step-{saved + EVERY:08d}.0123456789ab"
    half.mkdir()
    (half / "vectors-00000-of-00008.npy").write_bytes(b"half of it")
    trainer, third = start("trainer"), start("worker")
    until(lambda: trainer.poll() is not None)
    until(lambda: third.poll() is not None)

    assert (trainer.returncode, third.returncode) == (0, 0), trainer.said()
    assert f"going on from step {saved}" in trainer.said()
    assert "the training has ended: this worker ends" in third.said()
    records = toy.records(config, workdir)
    assert records[:saved] == kept
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert_only_whole_indexes(records, alone)
    assert_of_its_snapshot(config, workdir, versions(root)[-1])


def test_a_worker_that_is_started_twice_and_sleeps_beyond_its_lease(
    config, workdir, start
):
    config.train.steps = 2 * STEPS
    root = refresh_index.folder(config, workdir)
    everyone = trainer, sleeper, twin = [start(n) for n in ("trainer", "one", "one")]
    # Of a later version than the first, which the training waits for.
    until(lambda: versions(root) and has_lease(root, sleeper), *everyone)
    sleeper.send_signal(signal.SIGSTOP)
    before, at = versions(root)[-1], step_of(config, workdir)
    until(lambda: versions(root)[-1] > before, trainer, twin)
    assert step_of(config, workdir) > at, "the training does not wait for it"
    sleeper.send_signal(signal.SIGCONT)
    for process in everyone:
        until(lambda process=process: process.poll() is not None)
    said = [process.said() for process in everyone]
    assert [process.returncode for process in everyone] == [0] * 3, said
    records = toy.records(config, workdir)
    assert [record["step"] for record in records] == list(range(1, 2 * STEPS + 1))
    assert_only_whole_indexes(records, before)
    assert_of_its_snapshot(config, workdir, versions(root)[-1])


def test_sigterm_while_it_waits_for_an_index(config, workdir, start):
    limit = 8
    config.refresh.max_staleness = limit
    config.train.steps = 40
    trainer = start("trainer")
    until(lambda: "waits for an index" in trainer.said(), trainer)
    trainer.terminate()
    until(lambda: trainer.poll() is not None)
    assert trainer.returncode == 143, trainer.said()
    saved = checkpoint_of(config, workdir)
    assert saved > 0
    assert step_of(config, workdir) == saved

    trainer, worker = start("trainer"), start("worker")
    until(lambda: trainer.poll() is not None)
    until(lambda: worker.poll() is not None)
    assert (trainer.returncode, worker.returncode) == (0, 0), trainer.said()
    assert f"going on from step {saved}" in trainer.said()
    records = toy.records(config, workdir)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert max(record["staleness"] for record in records) == limit


def assert_only_whole_indexes(records, alone):
    asked = [record["index_step"] for record in records]
    assert asked[0] == 0
    assert asked == sorted(asked), "never an older one again"
    assert alone in asked, "the last one before all workers died"
    assert asked[-1] > alone, "the worker that came later is of use"
    for record in records:
        # Snapshots are of every fifth step; an index is never from the future.
        assert record["index_step"] % EVERY == 0
        assert record["staleness"] == record["step"] - 1 - record["index_step"] >= -1
