"""The loop with bad steps: what is saved, said and written down, and how it goes on."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
import toy_faults
import toy_training as toy

from realm_retro import artifacts
from realm_retro.errors import UserError
from realm_retro.train import loop
from realm_retro.train.bad_steps import FILE as BAD_STEPS
from realm_retro.train.checkpoint import Checkpoints
from realm_retro.train.metrics import FILE

STEPS = 12
ROWS = np.arange(toy.ROWS)


class Crash(Exception):
    pass


def recipe_of(steps, *hooks):
    recipe = toy_faults.poisoned(toy.make_recipe(hooks=hooks), steps)
    return dataclasses.replace(recipe, examples=lambda step: {"row": ROWS + 100 * step})


def run(run_dir, steps, *hooks, **changes):
    return toy.run(run_dir, recipe_of(steps, *hooks), steps=STEPS, **changes)


def crash_at(step):
    def hook(at):
        if at.step == step:
            raise Crash

    return hook


def read(run_dir, name):
    path = run_dir / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def outcome(run_dir):
    """The last checkpoint, and all that was logged and does not depend on the clock."""
    recipe, mesh = recipe_of({}), toy.mesh_of(1, 1, 1)
    _, abstract = loop.plan(recipe, toy.make_config(STEPS), toy.OPTIMIZER, mesh)
    with Checkpoints(run_dir) as checkpoints:
        found, _ = checkpoints.restore(checkpoints.latest(), abstract)
    clock = ("tokens_per_second", "seconds_per_step")
    records = [
        {name: x for name, x in record.items() if name not in clock}
        for record in read(run_dir, FILE)
    ]
    return jax.device_get(found), records, read(run_dir, BAD_STEPS)


def saved(run_dir):
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.latest()


@pytest.mark.parametrize("bad_step", [6, 9])
def test_stop_keeps_the_last_good_checkpoint(tmp_path, bad_step):
    # Step 10 would be saved: with the poison in 9 no metric has been seen by then.
    with pytest.raises(UserError, match=f"step {bad_step}: loss is nan") as error:
        run(tmp_path, {bad_step: np.nan}, checkpoint_every=5, log_every=100)
    assert saved(tmp_path) == 5
    said = str(error.value)
    assert "\n" not in said
    assert f"the batch is in {tmp_path / BAD_STEPS}" in said
    assert "config.optimizer.peak_learning_rate" in said
    assert "config.train.on_bad_step=skip" in said
    (note,) = read(tmp_path, BAD_STEPS)
    assert note["step"] == bad_step
    assert (note["reason"], note["then"]) == ("loss is nan", "stopped")
    assert (note["loss"], note["grad_norm"]) == ("nan", "nan")
    assert note["weight_norm"] > 0
    assert note["examples"] == {"row": (ROWS + 100 * (bad_step - 1)).tolist()}


SKIPPED = {3: np.nan, 8: np.inf, 9: np.nan}
SKIP = {"on_bad_step": "skip", "checkpoint_every": 4}


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """A run that skips three steps, and what it said."""
    run_dir, lines = tmp_path_factory.mktemp("skipping"), []
    assert run(run_dir, SKIPPED, **SKIP, report=lines.append).finished
    return *outcome(run_dir), lines


def test_skipped_steps_are_said_and_logged_and_none_other(skipping):
    state, records, notes, lines = skipping
    assert state.health.skipped == 3
    assert [note["step"] for note in notes] == [3, 8, 9]
    assert {note["then"] for note in notes} == {"skipped"}
    told = [line for line in lines if "skipped, nothing was learnt" in line]
    assert [line.split(":")[0] for line in told] == ["step 3", "step 8", "step 9"]
    # A step that does not count has no record.
    assert [record["step"] for record in records] == [1, 2, 4, 5, 6, 7, 10, 11, 12]
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1, 1, 3, 3, 3]
    assert any(line.startswith("step 4/12") and "skipped 1" in line for line in lines)
    assert np.isfinite([record["loss"] for record in records]).all()


def assert_same(run_dir, skipping):
    found = outcome(run_dir)
    chex.assert_trees_all_equal(found[0], skipping[0])
    assert found[1:] == skipping[1:3]


@pytest.mark.parametrize("crashes", [(9,), (10, 11)])
def test_crashes_change_nothing(tmp_path, skipping, crashes):
    for step in crashes:
        with pytest.raises(Crash):
            run(tmp_path, SKIPPED, crash_at(step), **SKIP)
    assert run(tmp_path, SKIPPED, **SKIP).finished
    assert_same(tmp_path, skipping)


def test_a_run_that_stopped_may_go_on_without_the_step(tmp_path, skipping):
    for _ in range(2):  # it stops at the same step again
        with pytest.raises(UserError, match="step 3: loss is nan"):
            run(tmp_path, SKIPPED, checkpoint_every=2)
        assert [note["then"] for note in read(tmp_path, BAD_STEPS)] == ["stopped"]
    assert run(tmp_path, SKIPPED, **SKIP).finished
    assert_same(tmp_path, skipping)


def test_an_exploded_loss_is_bad_and_says_why(tmp_path):
    with pytest.raises(UserError, match=r"step 11: loss is \S+, above \d+") as error:
        run(tmp_path, {11: 1e6})
    assert "config.train.max_loss_ratio" in str(error.value)
    (note,) = read(tmp_path, BAD_STEPS)
    assert note["loss"] > note["loss_limit"] > 100
    assert saved(tmp_path) == 10


def test_too_many_in_a_row_end_it(tmp_path):
    bad = dict.fromkeys((2, 3, 6, 7, 8, 9), np.nan)
    changes = {"on_bad_step": "skip", "max_bad_steps": 3, "checkpoint_every": 7}
    for _ in range(2):  # counted on where it goes on from step 7, the second of them
        with pytest.raises(UserError, match=r"step 8: loss is nan.*the last 3 was"):
            run(tmp_path, bad, **changes)
        assert saved(tmp_path) == 7
        notes = read(tmp_path, BAD_STEPS)
        assert [note["step"] for note in notes] == [2, 3, 6, 7, 8]
        assert [note["then"] for note in notes] == ["skipped"] * 4 + ["stopped"]
    assert run(tmp_path, bad, **{**changes, "max_bad_steps": 5}).finished


@pytest.mark.parametrize(
    "policy", [pytest.param("stop", marks=pytest.mark.slow), "skip"]
)
def test_weights_that_explode_are_never_saved(tmp_path, policy):
    rate = dataclasses.replace(toy.OPTIMIZER, peak_learning_rate=1e30, warmup_steps=0)
    with pytest.raises(UserError, match="step 1: the weights have exploded") as error:
        run(tmp_path, {}, optimizer=rate, on_bad_step=policy, checkpoint_every=1)
    assert "on_bad_step" not in str(error.value), "nothing is left to go on with"
    assert saved(tmp_path) is None
    assert read(tmp_path, BAD_STEPS)[0]["weight_norm"] == "inf"


@pytest.mark.slow
def test_weights_that_are_large_but_finite_are_seen_in_the_next_loss(tmp_path):
    rate = dataclasses.replace(toy.OPTIMIZER, peak_learning_rate=1e15, warmup_steps=0)
    with pytest.raises(UserError, match=r"step 2: loss is (nan|inf)"):
        run(tmp_path, {}, optimizer=rate, checkpoint_every=2)
    assert saved(tmp_path) is None


def test_one_that_was_never_bad_writes_nothing(tmp_path):
    run(tmp_path, {})
    assert not (tmp_path / BAD_STEPS).exists()


def test_an_older_checkpoint_has_no_health(tmp_path):
    with pytest.raises(Crash):
        run(tmp_path, {}, crash_at(7))
    path = tmp_path / "checkpoints" / "5" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    assert meta.pop("health")["counted"] == 5
    del meta[artifacts.CHECKSUM]  # it has none of this either
    path.write_text(json.dumps(meta))
    assert run(tmp_path, {}).finished
    assert outcome(tmp_path)[0].health.counted == 7
