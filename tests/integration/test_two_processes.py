"""Two real processes on loopback train as one, through the command itself.

What they log is compared with one process on one device, which trains here.
"""

import os
import shutil
import subprocess
import time

import numpy as np
import pytest
import toy_pretraining
import toy_processes
import toy_systems
import toy_training
from toy_processes import command

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

DEVICES = 4
# Between them: rows of a batch on one process and on both, weights and layers cut
# within a process and across the two.
MESHES = {
    "retro": (2, 1, 2),
    "retrofit": (1, 4, 1),
    "realm_host": (1, 2, 2),
    "realm_device": (2, 2, 1),
    "qa": (1, 1, 4),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    with toy_training.quick_compiles(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("systems")


@pytest.fixture(scope="module")
def alone(folder):
    """What a system logs on one device; each trains once."""
    found = {}

    def records(system):
        if system not in found:
            options = {"name": f"{system}_alone", "steps": 30}
            found[system] = toy_systems.trained(folder, system, (1, 1, 1), **options)
        return found[system]

    return records


@pytest.fixture
def start(folder):
    with toy_processes.launcher(folder) as start:
        yield start


def assert_same(found, wanted):
    assert [record["step"] for record in found] == list(range(1, len(wanted) + 1))
    losses = [[record["loss"] for record in records] for records in (found, wanted)]
    np.testing.assert_allclose(*losses, atol=1e-5, rtol=0)
    for one, other in zip(found, wanted, strict=True):
        # Which index was asked, what was found in it, which examples there were: means
        # over the rows of all processes.
        for name in ("index_step", "own_hits", "copies", "cut_spans", "beam"):
            assert one.get(name) == other.get(name), (one["step"], name)


@pytest.mark.parametrize("system", toy_systems.NAMES)
def test_two_processes_train_as_one(folder, alone, start, system):
    workdir = toy_systems.workdir_of(folder, system)
    config = toy_systems.make_config(
        folder, system, name=f"{system}_two", steps=30, mesh=MESHES[system]
    )
    outputs = start(
        command(folder, config, workdir), processes=2, devices=DEVICES
    ).finish()
    assert "step 30/30" in outputs[0]
    assert outputs[1] == "", "only the main process talks"
    found = toy_pretraining.records(config, workdir)
    assert_same(found, alone(system))
    if system.startswith("realm"):
        assert {record["index_step"] for record in found} == {0, 6, 12, 18, 24}


@pytest.mark.parametrize("system", ["retro", "realm_host", "qa"])
def test_a_run_goes_on_with_other_processes_and_another_mesh(
    folder, alone, start, system
):
    """Two processes save, one goes on and saves, two go on to the end."""
    workdir, name = toy_systems.workdir_of(folder, system), f"{system}_chain"
    saved = 0
    for processes, mesh in ((2, (2, 2, 1)), (1, (1, 2, 2)), (2, (1, 4, 1))):
        config = toy_systems.make_config(
            folder,
            system,
            name=name,
            steps=30,
            mesh=mesh,
            train={"checkpoint_every": 1},  # slow enough to be met on its way
        )
        running = start(
            command(folder, config, workdir), processes=processes, devices=DEVICES
        )
        if saved < 12:
            before = saved
            running.until(
                lambda config=config, before=before: (
                    toy_processes.newest_checkpoint(config, workdir) >= before + 6
                )
            )
            running.terminate()
            outputs = running.finish(143)
            saved = toy_processes.newest_checkpoint(config, workdir)
            assert f"stopped at step {saved}" in outputs[0]
            assert before + 6 <= saved < 30
        else:
            outputs = running.finish()
            before = saved
        assert ("going on from step" in outputs[0]) == (before > 0)
    assert_same(toy_pretraining.records(config, workdir), alone(system))


def test_jobs_of_the_launchers(folder, alone, tmp_path):
    """Two background jobs, as on two hosts of a pod: started, stopped, started."""
    shutil.copytree(toy_processes.ROOT / "launch", tmp_path / "a host" / "launch")
    script = tmp_path / "a host" / "launch" / "job.sh"
    workdir = toy_systems.workdir_of(folder, "retro")
    config = toy_systems.make_config(
        folder,
        "retro",
        name="jobs",
        steps=30,
        mesh=MESHES["retro"],
        train={"checkpoint_every": 1},
    )
    words = command(folder, config, workdir)

    def job(*arguments):
        done = subprocess.run(
            [str(script), *arguments],
            env={**os.environ, "PYTHONPATH": str(toy_processes.ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start():
        every = toy_processes.environments(folder, processes=2, devices=DEVICES)
        for index, variables in enumerate(every):
            assignments = [f"{name}={value}" for name, value in variables.items()]
            said = job("start", f"train-{index}", "env", *assignments, *words)
            assert ": running (" in said

    def ended(status):
        deadline = time.monotonic() + toy_processes.PATIENCE
        while "running" in (
            states := job("state", "train-0") + job("state", "train-1")
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert states.count(f" {status} (") == 2, job("logs", "train-0")

    try:
        start()
        while toy_processes.newest_checkpoint(config, workdir) < 3:
            assert ": running (" in job("state", "train-0"), job("logs", "train-0")
            time.sleep(0.05)
        assert "job train-1: stopped 143 (" in job("stop", "train-1", "120")
        ended(143)
        saved = toy_processes.newest_checkpoint(config, workdir)
        assert 3 <= saved < 30
        start()
        ended(0)
        assert f"going on from step {saved}" in job("logs", "train-0")
    finally:
        job("stop", "train-0", "0")
        job("stop", "train-1", "0")
    assert_same(toy_pretraining.records(config, workdir), alone("retro"))
