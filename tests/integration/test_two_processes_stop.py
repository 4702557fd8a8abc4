"""Two real processes that are told to stop, or meet a bad step, end at one step."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_training as toy

from realm_retro.parallel import hosts
from realm_retro.train.bad_steps import FILE as BAD_STEPS
from realm_retro.train.checkpoint import FOLDER
from realm_retro.train.metrics import FILE

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

GRACE = 30.0  # seconds from SIGTERM; clusters give as many, or more


def start(run_dir, *words, processes, pause=0.0):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(4 // processes),
        hosts.COORDINATOR: f"localhost:{port}",
        hosts.NUM_PROCESSES: str(processes),
    }
    command = [sys.executable, toy.__file__, str(run_dir), str(pause), "2", "2", "1"]
    command += words
    return [
        subprocess.Popen(
            command,
            env={**common, hosts.PROCESS_ID: str(index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes):
    outputs = [process.communicate()[0] for process in processes]
    return [process.returncode for process in processes], outputs


def losses(run_dir):
    lines = pathlib.Path(run_dir / FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 21))
    return np.array([record["loss"] for record in records])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("single")
    assert finish(start(run_dir, processes=1))[0] == [0]
    return losses(run_dir)


@pytest.mark.parametrize("told", [(1,), (0,), (0, 1)])
def test_sigterm_stops_all_at_the_same_step(tmp_path, single, told):
    processes = start(tmp_path, processes=2, pause=0.3)
    while not (tmp_path / FOLDER / "5").exists():
        assert processes[0].poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    for index in told:
        processes[index].send_signal(signal.SIGTERM)
    status, outputs = finish(processes)
    assert status == [143, 143]
    assert time.monotonic() - began < GRACE
    newest = max(int(path.name) for path in (tmp_path / FOLDER).iterdir())
    assert 5 < newest < 20
    for output in outputs:
        assert output.splitlines()[-1] == f"ended after {newest}"
    # The number of processes may change between starts.
    assert finish(start(tmp_path, processes=1))[0] == [0]
    np.testing.assert_allclose(losses(tmp_path), single, atol=1e-5, rtol=0)


def test_a_bad_step_stops_all_and_is_noted_once(tmp_path):
    status, outputs = finish(start(tmp_path, "bad=8", processes=2))
    assert status == [2, 2]
    for output in outputs:
        assert "step 8: loss is nan" in output
    notes = (tmp_path / BAD_STEPS).read_text().splitlines()
    assert [json.loads(note)["step"] for note in notes] == [8]
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"5"}
