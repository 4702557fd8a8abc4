"""Two real processes that are told to stop, or meet a bad step, end at one step."""

import json
import pathlib
import sys
import time

import numpy as np
import pytest
import toy_processes
import toy_training as toy

from realm_retro.train.bad_steps import FILE as BAD_STEPS
from realm_retro.train.checkpoint import FOLDER
from realm_retro.train.metrics import FILE

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

GRACE = 30.0  # seconds from SIGTERM; clusters give as many, or more


@pytest.fixture
def start(tmp_path_factory):
    """Starts the toy on four devices in a folder, slowly if it is to be stopped."""
    with toy_processes.launcher(tmp_path_factory.mktemp("logs")) as start:

        def run(run_dir, *words, processes, pause=0.0):
            program = [sys.executable, toy.__file__, str(run_dir), str(pause)]
            sizes = ["2", "2", "1"]
            return start([*program, *sizes, *words], processes=processes, devices=4)

        yield run


def losses(run_dir):
    lines = pathlib.Path(run_dir / FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 21))
    return np.array([record["loss"] for record in records])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("single")
    with toy.quick_compiles(tmp_path_factory):
        toy.run(run_dir)
    return losses(run_dir)


@pytest.mark.parametrize("told", [(1,), (0,), (0, 1)])
def test_sigterm_stops_all_at_the_same_step(tmp_path, single, start, told):
    running = start(tmp_path, processes=2, pause=0.3)
    running.until((tmp_path / FOLDER / "5").exists)
    began = time.monotonic()
    for index in told:
        running.terminate(index)
    outputs = running.finish(143)
    assert time.monotonic() - began < GRACE
    newest = max(int(path.name) for path in (tmp_path / FOLDER).iterdir())
    assert 5 < newest < 20
    for output in outputs:
        assert f"ended after {newest}\n" in output
    # The number of processes may change between starts.
    start(tmp_path, processes=1).finish()
    np.testing.assert_allclose(losses(tmp_path), single, atol=1e-5, rtol=0)


def test_a_bad_step_stops_all_and_is_noted_once(tmp_path, start):
    for output in start(tmp_path, "bad=8", processes=2).finish(2):
        assert "step 8: loss is nan" in output
    notes = (tmp_path / BAD_STEPS).read_text().splitlines()
    assert [json.loads(note)["step"] for note in notes] == [8]
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"5"}
