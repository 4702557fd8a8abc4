"""2 n steps equal n steps, an interruption, and n steps: bit for bit."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest
import toy_pretraining
import toy_training as toy

from realm_retro.train import loop
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


def final_state(run_dir, steps=20):
    """Weights, moments and health as host arrays."""
    recipe, mesh = toy.make_recipe(), toy.mesh_of(1, 1, 1)
    _, abstract = loop.plan(recipe, toy.make_config(steps), toy.OPTIMIZER, mesh)
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.latest() == steps
        found, _ = checkpoints.restore(steps, abstract)
    return jax.device_get(found)


def logged(run_dir):
    """What was logged and does not depend on the clock."""
    lines = (run_dir / FILE).read_text().splitlines()
    names = ("step", "loss", "accuracy", "grad_norm", "learning_rate", "tokens")
    return [[json.loads(line)[name] for name in names] for line in lines]


def assert_same_run(run_dir, straight, steps=20):
    chex.assert_trees_all_equal(
        final_state(run_dir, steps), final_state(straight, steps)
    )
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


def start(run_dir, pause=0.0, *words):
    program = pathlib.Path(toy.__file__)
    quick = toy_pretraining.quick(run_dir.parent) if words else {}
    return subprocess.Popen(
        [sys.executable, str(program), str(run_dir), str(pause), *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **quick, "JAX_NUM_CPU_DEVICES": "1"},
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


KILLS, LONG = 20, 300  # no life is long enough for all steps


def newest(run_dir):
    """The newest whole checkpoint, 0 where there is none."""
    names = [path.name for path in (run_dir / FOLDER).glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def logged_step(run_dir):
    """The last step with a whole record."""
    path = run_dir / FILE
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments(tmp_path):
    """In the start-up, between steps, inside of writes: wherever they fall."""
    straight, killed, words = (
        tmp_path / "straight",
        tmp_path / "killed",
        f"steps={LONG}",
    )
    began = time.monotonic()
    assert finish(start(straight, 0.0, words))[0] == 0
    draw, half_written, reached = random.Random(0), 0, []
    for number in range(KILLS):
        kill_somewhere(draw, killed, words, in_start_up=number % 4 == 3)
        half_written += any((killed / FOLDER).glob("*orbax-checkpoint-tmp*"))
        reached.append(newest(killed))
    assert reached == sorted(reached), "a whole checkpoint is never lost"
    assert 0 < reached[-1] < LONG
    assert finish(start(killed, 0.0, words))[0] == 0
    assert_same_run(killed, straight, LONG)
    seconds = time.monotonic() - began
    print(f"{KILLS} kills, {half_written} in a write; {reached}; {seconds:.0f} s")
    assert half_written > 0


def kill_somewhere(draw, run_dir, words, *, in_start_up):
    """Kills a life after some steps and a moment more, or mostly before the first."""
    saved, process = newest(run_dir), start(run_dir, 0.05, words)
    if in_start_up:
        time.sleep(draw.uniform(0, 5))
    else:
        until = saved + draw.randint(1, 12)
        while logged_step(run_dir) < until:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    status, output = finish(process)
    assert status == -signal.SIGKILL
    said = [line for line in output.splitlines() if "going on from" in line]
    assert all(line.endswith(f"from step {saved}") for line in said)
