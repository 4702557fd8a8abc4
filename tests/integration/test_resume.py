"""2 n steps equal n steps, an interruption, and n steps: bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest
import toy_training as toy

from realm_retro.train import optim, state
from realm_retro.train.checkpoint import FOLDER, Checkpoints
from realm_retro.train.metrics import FILE


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    with toy.quick_compiles(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 20 steps that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert toy.run(run_dir).finished
    return run_dir


def final_state(run_dir, step=20):
    """Weights and moments as host arrays."""
    params = state.abstract_params(toy.make_recipe().init, toy.mesh_of(1, 1, 1))
    everything = jax.tree.map(lambda _: True, params)
    rule = optim.make_optimizer(
        toy.OPTIMIZER, steps=20, trainable=everything, decayed=everything
    )
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.latest() == step
        found, _ = checkpoints.restore(step, state.abstract_state(params, rule))
    return jax.device_get(found)


def logged(run_dir):
    """What was logged and does not depend on the clock."""
    lines = (run_dir / FILE).read_text().splitlines()
    names = ("step", "loss", "accuracy", "grad_norm", "learning_rate", "tokens")
    return [[json.loads(line)[name] for name in names] for line in lines]


def assert_same_run(run_dir, straight):
    chex.assert_trees_all_equal(final_state(run_dir), final_state(straight))
    assert logged(run_dir) == logged(straight)


class Crash(Exception):
    pass


def crash_at(step):
    def hook(at):
        if at.step == step:
            raise Crash

    return toy.make_recipe(hooks=(hook,))


@pytest.mark.parametrize("steps", [(3,), (10,), (11, 17)])
def test_crashes_change_nothing(tmp_path, straight, steps):
    for step in steps:
        with pytest.raises(Crash):
            toy.run(tmp_path, crash_at(step))
    lines = []
    assert toy.run(tmp_path, report=lines.append).finished
    saved = (steps[-1] - 1) // 5 * 5
    assert any(f"going on from step {saved}" in line for line in lines) == (saved > 0)
    assert_same_run(tmp_path, straight)


def test_going_on_with_another_mesh(tmp_path, straight):
    with pytest.raises(Crash):
        toy.run(tmp_path, crash_at(12), mesh=toy.mesh_of(2, 2, 2))
    assert toy.run(tmp_path, mesh=toy.mesh_of(1, 4, 1)).finished
    chex.assert_trees_all_close(
        final_state(tmp_path).params, final_state(straight).params, atol=1e-5
    )
    assert [record[0] for record in logged(tmp_path)] == list(range(1, 21))


def test_sigterm_saves_and_ends(tmp_path, straight):
    def hook(at):
        if at.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = toy.run(tmp_path, toy.make_recipe(hooks=(hook,)))
    assert (outcome.finished, outcome.step) == (False, 7)
    assert not (tmp_path / "manifest.json").exists()
    assert len(logged(tmp_path)) == 7
    assert toy.run(tmp_path).finished
    assert_same_run(tmp_path, straight)


def start(run_dir, pause=0.0):
    program = pathlib.Path(toy.__file__)
    return subprocess.Popen(
        [sys.executable, str(program), str(run_dir), str(pause)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )


def finish(process):
    """Exit status and output."""
    output, _ = process.communicate()
    return process.returncode, output


def stop_when(path, process, sent):
    while not path.exists():
        assert process.poll() is None, "the training ended before it was stopped"
        time.sleep(0.001)
    process.send_signal(sent)
    return finish(process)


@pytest.fixture(scope="module")
def straight_process(tmp_path_factory):
    """The same run in a process of its own, compiled as the killed ones are."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert finish(start(run_dir))[0] == 0
    return run_dir


@pytest.mark.slow
def test_a_killed_process(tmp_path, straight_process):
    checkpoint = tmp_path / FOLDER / "10"
    status, _ = stop_when(checkpoint, start(tmp_path, 0.3), signal.SIGKILL)
    assert status == -signal.SIGKILL
    status, output = finish(start(tmp_path))
    assert status == 0
    assert "going on from step 10" in output
    assert_same_run(tmp_path, straight_process)


@pytest.mark.slow
def test_a_process_killed_while_it_writes_a_checkpoint(tmp_path, straight_process):
    # Orbax writes under this name until the checkpoint is whole.
    half = tmp_path / FOLDER / "10.orbax-checkpoint-tmp"
    status, _ = stop_when(half, start(tmp_path, 0.3), signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert half.exists()
    status, output = finish(start(tmp_path))
    assert status == 0
    assert "going on from step 5" in output
    assert_same_run(tmp_path, straight_process)


@pytest.mark.slow
def test_a_process_that_is_asked_to_end(tmp_path, straight_process):
    first = tmp_path / FOLDER / "5"
    status, _ = stop_when(first, start(tmp_path, 0.3), signal.SIGTERM)
    assert status == 143
    newest = max(int(path.name) for path in (tmp_path / FOLDER).iterdir())
    assert 5 < newest < 20
    assert finish(start(tmp_path))[0] == 0
    assert_same_run(tmp_path, straight_process)
