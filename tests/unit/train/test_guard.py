"""A bad step is found on the device and leaves no trace but its count."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
import toy_faults
import toy_training as toy

from realm_retro.parallel import axes, hosts
from realm_retro.train import guard, loop, state
from realm_retro.train.step import make_train_step

RATIO = 3.0
STEPS = 16
# The rest as in `test_bad_steps`, so that the program is compiled once for both.
RUN = {"seed": 3, "max_loss_ratio": 100.0}


def judged(losses, *, weight=1.0, grad_norm=1.0, ratio=RATIO):
    """Health and limit after each of some losses."""
    health, found = guard.fresh(), []
    judge = jax.jit(lambda *args: guard.judge(*args, max_loss_ratio=ratio))
    for loss in losses:
        pair = (np.float32(loss * weight), np.float32(weight))
        health, limit = judge(health, pair, np.float32(grad_norm))
        found.append((jax.device_get(health), float(limit)))
    return found


@pytest.mark.parametrize(
    ("loss", "weight", "grad_norm"),
    [
        (np.nan, 1, 1),
        (np.inf, 1, 1),
        (-np.inf, 1, 1),
        (1, np.inf, 1),
        (0, np.nan, 1),
        (1, 1, np.nan),
        (1, 1, np.inf),
    ],
)
def test_what_is_not_finite_is_bad(loss, weight, grad_norm):
    ((health, _),) = judged([loss], weight=weight, grad_norm=grad_norm)
    assert (health.in_a_row, health.skipped) == (1, 1)
    assert (health.mean_loss, health.counted) == (0, 0)


def test_bad_steps_are_counted_in_all_and_in_a_row():
    found = [health for health, _ in judged([1, np.nan, np.nan, 1, np.inf])]
    assert [int(health.in_a_row) for health in found] == [0, 1, 2, 0, 1]
    assert [int(health.skipped) for health in found] == [0, 1, 2, 2, 3]
    assert [int(health.counted) for health in found] == [1, 1, 1, 2, 2]


def test_the_first_ten_may_be_anything_and_a_bad_one_does_not_move_the_mean():
    found = judged([2, 6] * 5 + [12.1, 11.9, 4.0])
    limits = [limit for _, limit in found]
    assert limits[:10] == [np.inf] * 10
    assert limits[10] == limits[11] == pytest.approx(RATIO * 4)
    assert [int(health.in_a_row) for health, _ in found[10:]] == [1, 0, 0]
    assert found[11][0].mean_loss == pytest.approx(4 + (11.9 - 4) / 11)


def test_the_mean_forgets():
    losses = [10.0] * 100 + [2.0] * 500
    health, _ = judged(losses)[-1]
    assert health.mean_loss == pytest.approx(2, abs=0.1)
    expected = 0.0
    for i, loss in enumerate(losses):
        expected += (loss - expected) / min(i + 1, 100)
    assert health.mean_loss == pytest.approx(expected, rel=1e-4)


def test_a_model_that_is_nearly_always_right_may_be_wrong_once():
    found = judged([0.01] * 12 + [RATIO - 0.1, RATIO + 0.1])
    assert [int(health.in_a_row) for health, _ in found[12:]] == [0, 1]


def test_any_finite_loss_is_good_without_a_ratio():
    assert all(h.in_a_row == 0 for h, _ in judged([1] * 12 + [1e30], ratio=0))


def test_a_batch_without_targets_says_nothing():
    ((health, _),) = judged([0], weight=0)
    assert (health.in_a_row, health.counted) == (0, 0)


def test_health_goes_through_json_exactly():
    health = guard.Health(
        np.float32(1) / np.float32(3), np.int32(7), np.int32(2), np.int32(1)
    )
    mesh = toy.mesh_of(2, 1, 1)
    _, planned = loop.plan(toy.make_recipe(), toy.make_config(), toy.OPTIMIZER, mesh)
    again = guard.from_meta(guard.as_meta(health), planned.health)
    chex.assert_trees_all_equal(jax.device_get(again), health)
    assert state.shardings_of(again) == state.shardings_of(planned.health)
    before = guard.from_meta(None, planned.health)
    chex.assert_trees_all_equal(jax.device_get(before), guard.fresh())


@dataclasses.dataclass
class Taken:
    """Host copies of the state before and after each step, and metrics."""

    states: list
    metrics: list
    programs: int


def taken(steps, *, accumulation=1, mesh=None, **changes):
    """Steps of a toy with poison at some of them."""
    mesh = mesh or toy.mesh_of(1, 1, 1)
    recipe = toy_faults.poisoned(toy.make_recipe(**changes), steps)
    rule, abstract = loop.plan(recipe, toy.make_config(12), toy.OPTIMIZER, mesh)
    step_fn = make_train_step(
        recipe, rule, abstract, mesh, accumulation=accumulation, **RUN
    )
    current = state.init_state(recipe.init, rule, abstract, 0)
    found = Taken([jax.device_get(current)], [], 0)
    for step in range(STEPS):
        batch = {
            name: hosts.to_global(
                x, axes.sharding(recipe.batch_spec[name], x.shape, mesh)
            )
            for name, x in recipe.batch_at(step).items()
        }
        current, metrics = step_fn(current, batch)
        found.states.append(jax.device_get(current))
        found.metrics.append(jax.device_get(metrics))
    found.programs = step_fn._cache_size()
    return found


def learnt(found):
    return found.params, found.opt_state


@pytest.mark.parametrize(
    ("poison", "accumulation", "sizes"),
    [
        (np.nan, 1, (1, 1, 1)),
        (1e4, 1, (1, 1, 1)),
        (1e30, 1, (1, 1, 1)),  # finite, but its gradient's norm is not
        (np.inf, 2, (1, 2, 1)),
    ],
)
def test_a_bad_step_changes_no_weight_and_no_moment(poison, accumulation, sizes):
    found = taken({13: poison}, accumulation=accumulation, mesh=toy.mesh_of(*sizes))
    bad = [int(m["bad_in_a_row"][0]) for m in found.metrics]
    assert bad == [int(step == 13) for step in range(1, STEPS + 1)]
    for step, (before, after) in enumerate(
        zip(found.states, found.states[1:], strict=False), 1
    ):
        assert after.step == step
        assert after.health.skipped == (step >= 13)
        if step == 13:
            chex.assert_trees_all_equal(learnt(after), learnt(before))
        else:
            with pytest.raises(AssertionError):
                chex.assert_trees_all_equal(after.params, before.params)
    assert found.programs == 1
    chex.assert_tree_all_finite(found.states[-1].params)


def test_the_steps_after_it_are_those_of_a_run_whose_clock_stood_still():
    # The same batches but the bad one, with the optimiser's clock one step behind.
    poison, plain = taken({13: np.nan}), taken({})
    rates = [float(m["learning_rate"][0]) for m in poison.metrics]
    expected = [float(m["learning_rate"][0]) for m in plain.metrics]
    assert rates == expected[:13] + expected[12:-1]
    chex.assert_trees_all_equal(learnt(poison.states[12]), learnt(plain.states[12]))
