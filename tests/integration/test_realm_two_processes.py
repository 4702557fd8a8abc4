"""REALM in two processes on loopback: they ask the same index at the same step."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_pretraining as toy
from etils import epath

from realm_retro.cli import refresh_index
from realm_retro.parallel import hosts
from realm_retro.retrieval import refresh

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

PATIENCE = 300.0
GRACE = 30.0  # seconds from SIGTERM; clusters give as many, or more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivers")
    toy.write_rivers(folder)
    toy.prepared(toy.make_config(folder), epath.Path(folder / "work"))
    return folder


def start(folder, config, *, processes, pause=0.0):
    """Starts a training of two devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = toy.write_config(folder / f"{config.name}.py", config)
    command = [sys.executable, toy.__file__, str(path), str(folder / "work")]
    common = {
        **os.environ,
        **toy.quick(folder),
        "JAX_NUM_CPU_DEVICES": str(2 // processes),
        hosts.COORDINATOR: f"localhost:{port}",
        hosts.NUM_PROCESSES: str(processes),
    }
    return [
        subprocess.Popen(
            [*command, str(pause)],
            env={**common, hosts.PROCESS_ID: str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes, status=0):
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=PATIENCE)[0])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [p.returncode for p in processes] == [status] * len(processes), outputs
    return outputs


def config_of(folder, name, *, placement="host", mesh=None, **sections):
    return toy.make_config(
        folder,
        name=name,
        mesh=mesh or {"data": 1, "fsdp": 2},  # weights lie on both
        pretrain={"placement": placement, **sections.pop("pretrain", {})},
        **sections,
    )


@pytest.mark.parametrize("placement", ["host", "device"])
def test_two_processes_train_as_one(folder, placement):
    found = {}
    for processes in (1, 2):
        config = config_of(folder, f"{placement}{processes}", placement=placement)
        outputs = finish(start(folder, config, processes=processes))
        found[processes] = toy.records(config, folder / "work")
    assert "index of step 6 in use" in outputs[0]
    assert "index" not in outputs[1], "only the main process talks"
    assert len(found[1]) == 8
    for one, two in zip(found[1], found[2], strict=True):
        assert one["index_step"] == two["index_step"]
        for name in ("loss", "own_hits", "retrieved"):
            np.testing.assert_allclose(two[name], one[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("placement", ["host", "device"])
def test_sigterm_to_both_saves_the_same_step_and_changes_nothing(folder, placement):
    expected = config_of(folder, f"straight-{placement}", placement=placement)
    finish(start(folder, expected, processes=2))
    config = config_of(folder, f"told-{placement}", placement=placement)
    run_dir = toy.run_dir(config, folder / "work")
    processes = start(folder, config, processes=2, pause=0.3)
    while not (run_dir / "checkpoints" / "4").exists():
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.01)
    began = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = finish(processes, 143)
    assert time.monotonic() - began < GRACE
    ends = {output.splitlines()[-1] for output in outputs}
    saved = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    assert ends == {f"ended after {saved}"}
    assert 4 < saved < 8
    outputs = finish(start(folder, config, processes=2))
    assert f"going on from step {saved}" in outputs[0]
    found = toy.records(config, folder / "work")
    assert found == toy.records(expected, folder / "work")


@pytest.fixture
def worker(folder):
    """Starts a refresh worker; it does not outlive the test."""
    running = []

    def run(config):
        command = [sys.executable, "-m", "realm_retro.cli.refresh_index"]
        command += [f"--config={folder / config.name}.py", f"--workdir={folder}/work"]
        env = {**os.environ, **toy.quick(folder), "JAX_NUM_CPU_DEVICES": "1"}
        running.append(subprocess.Popen(command, env=env))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()


def test_workers_beside_two_processes_and_sigterm_to_one_that_waits(folder, worker):
    limit, steps = 8, 40
    config = config_of(
        folder,
        "workers",
        pretrain={"refresh": "workers"},
        refresh={"every": 20, "max_staleness": limit, "poll_seconds": 0.05},
        train={"steps": steps, "checkpoint_every": 10},
    )
    # Nobody refreshes: they wait, and end when one of them is told to.
    processes = start(folder, config, processes=2)
    log = toy.run_dir(config, folder / "work") / "metrics.jsonl"
    waiting = refresh_index.folder(config, epath.Path(folder / "work"))
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and newest_snapshot(waiting) >= 5):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.05)
    time.sleep(2.0)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, 143)
    assert "waits for an index" in outputs[0]

    beside = start(folder, config, processes=2, pause=0.05)
    one = worker(config)
    outputs = finish(beside)
    assert "going on from step" in outputs[0]
    assert one.wait(PATIENCE) == 0
    records = toy.records(config, folder / "work")
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    asked = [record["index_step"] for record in records]
    assert asked == sorted(asked)
    assert asked[-1] >= steps - 1 - limit
    assert max(record["staleness"] for record in records) <= limit


def newest_snapshot(root):
    found = refresh.newest_snapshot(root, verify=False)
    return found.step if found else -1
