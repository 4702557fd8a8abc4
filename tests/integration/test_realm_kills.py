"""Pre-training is killed wherever it can be: no resume changes a bit.

The index is refreshed inline, every third step, so that a run is a function of its
seed alone; what workers do beside a trainer that is killed is in `test_realm_workers`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest
import toy_pretraining as toy
from etils import epath

from realm_retro.cli import towers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

KILLS = 20
PATIENCE = 600.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivers")
    toy.write_rivers(folder)
    toy.prepared(toy.make_config(folder), epath.Path(folder / "work"))
    return folder


def config_of(folder, name, steps):
    return toy.make_config(
        folder,
        name=name,
        # Many small shards: an index takes a while. What a killed trainer had leased
        # is free soon.
        refresh={"every": 3, "shard_rows": 4, "lease_seconds": 1.0},
        train={"steps": steps, "checkpoint_every": 4},
    )


def start(folder, config, pause=0.0):
    path = toy.write_config(folder / f"{config.name}.py", config)
    return subprocess.Popen(
        [sys.executable, toy.__file__, str(path), str(folder / "work"), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **toy.quick(folder), "JAX_NUM_CPU_DEVICES": "1"},
    )


def finished(folder, config):
    """Trains to the end; final weights and everything that was logged."""
    process = start(folder, config)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    workdir = epath.Path(folder / "work")
    params = towers.run_params(config, workdir, config.name)
    return jax.device_get(params), toy.records(config, workdir)


def until(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def kill(process):
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    return output


def assert_same_run(found, expected):
    chex.assert_trees_all_equal(found[0], expected[0])
    assert found[1] == expected[1]


# What there is while it happens, under WORKDIR, of a run of 16 steps; one life each.
PLACES = [
    "refresh/{}/building/step-00000000-*/vectors-00003-*.npy",  # the first index
    "refresh/{}/versions/.step-00000003.*",  # its publication
    "runs/{}/checkpoints/4.orbax-checkpoint-tmp",
    "refresh/{}/snapshots/.step-00000006.*",
    "refresh/{}/building/step-00000006-*/leases/shard-00009.*",
    "runs/{}/checkpoints/8.orbax-checkpoint-tmp",
    "refresh/{}/versions/.step-00000009.*",
    "refresh/{}/versions/step-00000012",  # published, not yet in use
]


def test_kills_inside_of_writes_and_of_swaps(folder):
    expected = finished(folder, config_of(folder, "whole", 16))
    config = config_of(folder, "placed", 16)
    for place in PLACES:
        kill_when_there(folder, config, place.format(config.name))
    assert_same_run(finished(folder, config), expected)


def kill_when_there(folder, config, pattern):
    process, work = start(folder, config), folder / "work"
    until(lambda: list(work.glob(pattern)), process)
    kill(process)
    assert list(work.glob(pattern)), f"{pattern}: it was over before the kill"


def test_twenty_kills_at_random_moments(folder):
    steps, began = 200, time.monotonic()
    expected = finished(folder, config_of(folder, "straight", steps))
    config = config_of(folder, "killed", steps)
    run_dir = toy.run_dir(config, folder / "work")
    root = folder / "work" / "refresh" / config.name
    draw, reached, writes, swaps = random.Random(1), [], 0, 0
    for number in range(KILLS):
        kill_somewhere(draw, folder, config, in_start_up=number % 4 == 3)
        writes += any((run_dir / "checkpoints").glob("*orbax-checkpoint-tmp*"))
        swaps += any(root.glob("building/*")) or any(root.glob("*/.step-*"))
        reached.append(newest(run_dir))
    assert reached == sorted(reached), "a whole checkpoint is never lost"
    assert 0 < reached[-1] < steps
    assert_same_run(finished(folder, config), expected)
    seconds = time.monotonic() - began
    print(f"{KILLS} kills, {writes} in a write, {swaps} in a swap; {seconds:.0f} s")
    assert writes > 0
    assert swaps > 0


def kill_somewhere(draw, folder, config, *, in_start_up):
    """Kills a life after some steps and a moment more, or mostly before the first."""
    run_dir = toy.run_dir(config, folder / "work")
    saved, process = newest(run_dir), start(folder, config, 0.02)
    if in_start_up:
        time.sleep(draw.uniform(0, 8))
    else:
        wanted = saved + draw.randint(1, 9)
        until(lambda: logged_step(run_dir) >= wanted, process)
        time.sleep(draw.uniform(0, 0.3))
    said = [line for line in kill(process).splitlines() if "going on from" in line]
    assert all(line.endswith(f"from step {saved}") for line in said)


def newest(run_dir):
    """The newest whole checkpoint, 0 where there is none."""
    names = [path.name for path in (run_dir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def logged_step(run_dir):
    """The last step with a whole record."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0
