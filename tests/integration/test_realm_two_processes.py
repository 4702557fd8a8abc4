"""REALM in two processes and workers beside them: process 0 decides for both."""

import os
import subprocess
import sys
import time

import pytest
import toy_pretraining as toy
import toy_processes
import toy_systems

from realm_retro.cli import refresh_index
from realm_retro.retrieval import refresh

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("systems")


@pytest.fixture
def start(folder):
    with toy_processes.launcher(folder) as start:
        yield start


@pytest.fixture
def worker(folder):
    """Starts a refresh worker; it does not outlive the test."""
    running = []

    def run(config, workdir):
        command = [sys.executable, "-m", "realm_retro.cli.refresh_index"]
        command += [f"--config={folder / config.name}.py", f"--workdir={workdir}"]
        env = {**os.environ, **toy.quick(folder), "JAX_NUM_CPU_DEVICES": "1"}
        running.append(subprocess.Popen(command, env=env))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()


def test_workers_beside_two_processes_and_sigterm_to_one_that_waits(
    folder, start, worker
):
    limit, steps = 8, 40
    workdir = toy_systems.workdir_of(folder, "realm_host")
    config = toy_systems.make_config(
        folder,
        "realm_host",
        name="workers",
        steps=steps,
        mesh=(1, 2, 1),  # weights lie on both, and half of the rows on each
        pretrain={"refresh": "workers"},
        refresh={"every": 20, "max_staleness": limit, "poll_seconds": 0.05},
        train={"checkpoint_every": 10},
    )
    # Nobody refreshes: they wait, and end when one of them is told to.
    words = toy_processes.command(folder, config, workdir)
    running = start(words, processes=2, devices=2)
    log = toy.run_dir(config, workdir) / "metrics.jsonl"
    waiting = refresh_index.folder(config, workdir)
    running.until(lambda: log.exists() and newest_snapshot(waiting) >= 5)
    time.sleep(2.0)
    running.terminate()
    outputs = running.finish(143)
    assert "waits for an index" in outputs[0]
    assert outputs[1] == "", "only the main process talks"

    beside = start(words, processes=2, devices=2)
    one = worker(config, workdir)
    outputs = beside.finish()
    assert "going on from step" in outputs[0]
    assert one.wait(toy_processes.PATIENCE) == 0
    records = toy.records(config, workdir)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    asked = [record["index_step"] for record in records]
    # A mean over the rows of both: of two indexes it would be no step of a snapshot.
    assert set(asked) <= {float(step) for step in range(steps)}
    assert asked == sorted(asked)
    assert asked[-1] >= steps - 1 - limit
    assert max(record["staleness"] for record in records) <= limit


def newest_snapshot(root):
    found = refresh.newest_snapshot(root, verify=False)
    return found.step if found else -1
