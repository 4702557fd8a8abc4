import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training as toy

from realm_retro.parallel import axes, hosts
from realm_retro.train import optim, state
from realm_retro.train.step import make_train_step

STILL = toy.make_recipe(dropout=0.0)


def build(recipe, mesh=None, accumulation=1, trainable=None, seed=0):
    mesh = mesh or toy.mesh_of(1, 1, 1)
    boxed = jax.eval_shape(recipe.init, jax.random.key(0))
    params = state.abstract_params(recipe.init, mesh)
    rule = optim.make_optimizer(
        toy.OPTIMIZER,
        steps=20,
        trainable=trainable or jax.tree.map(lambda _: True, params),
        decayed=optim.decay_mask(boxed),
    )
    abstract = state.abstract_state(params, rule)
    step_fn = make_train_step(
        recipe, rule, abstract, mesh, seed=seed, accumulation=accumulation
    )
    return step_fn, state.init_state(recipe.init, rule, abstract, seed)


def place(recipe, step, mesh=None):
    mesh = mesh or toy.mesh_of(1, 1, 1)
    return {
        name: hosts.to_global(x, axes.sharding(recipe.batch_spec[name], x.shape, mesh))
        for name, x in recipe.batch_at(step).items()
    }


def run(recipe, steps=5, **kwargs):
    step_fn, current = build(recipe, **kwargs)
    losses = []
    for step in range(steps):
        batch = place(recipe, step, kwargs.get("mesh"))
        current, metrics = step_fn(current, batch)
        total, weight = metrics["loss"]
        losses.append(float(total) / float(weight))
    return current, np.array(losses)


@pytest.fixture(scope="module")
def plain_run():
    return run(STILL)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_changes_nothing(plain_run, accumulation):
    # The rows have unequal lengths: a mean over pieces would give another loss.
    whole, losses = plain_run
    pieces, again = run(STILL, accumulation=accumulation)
    np.testing.assert_allclose(again, losses, atol=1e-6, rtol=0)
    for a, b in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(pieces.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_accumulation_on_a_mesh(plain_run):
    _, again = run(STILL, mesh=toy.mesh_of(2, 2, 1), accumulation=2)
    np.testing.assert_allclose(again, plain_run[1], atol=1e-6, rtol=0)


def test_pieces_need_no_communication():
    # Each piece is cut from the rows that a device has: nothing but sums may move.
    mesh = toy.mesh_of(4, 1, 1)
    step_fn, current = build(STILL, mesh=mesh, accumulation=2)
    text = step_fn.lower(current, place(STILL, 0, mesh)).compile().as_text()
    assert "all-reduce" in text
    for moved in ("all-to-all", "collective-permute", "all-gather"):
        assert moved not in text


def test_loss_is_the_mean_over_all_tokens():
    step_fn, current = build(STILL)
    params = jax.device_get(current.params)
    batch = STILL.batch_at(0)
    losses, weights = [], []
    for row in range(toy.ROWS):
        one = {name: x[row : row + 1] for name, x in batch.items()}
        total, weight, _ = STILL.loss(params, one, jax.random.key(0))
        losses.append(float(total))
        weights.append(float(weight))
    assert len(set(weights)) > 1
    _, metrics = step_fn(current, place(STILL, 0))
    np.testing.assert_allclose(metrics["loss"][0], sum(losses), rtol=1e-5)
    assert metrics["loss"][1] == sum(weights)


def test_a_batch_without_targets_changes_no_weight_but_by_decay():
    def nothing(step):
        batch = toy.batch_at(step)
        return {**batch, "mask": np.zeros_like(batch["mask"])}

    recipe = toy.make_recipe(batch_at=nothing)
    step_fn, current = build(recipe)
    before = jax.device_get(current.params["up"]["bias"])
    after, metrics = step_fn(current, place(recipe, 0))
    assert metrics["grad_norm"][0] == 0
    np.testing.assert_array_equal(after.params["up"]["bias"], before)


def test_bfloat16_compute_keeps_a_float32_state():
    recipe = toy.make_recipe(dtype=jnp.bfloat16)
    after, losses = run(recipe, accumulation=2)
    kinds = {x.dtype for x in jax.tree.leaves((after.params, after.opt_state))}
    assert kinds == {np.dtype("float32"), np.dtype("int32")}
    assert np.all(np.isfinite(losses))


def test_the_old_state_is_donated():
    recipe = toy.make_recipe()
    step_fn, old = build(recipe)
    new, _ = step_fn(old, place(recipe, 0))
    assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt_state)))
    assert new.step == 1


def test_frozen_weights_stay_bit_for_bit():
    recipe = toy.make_recipe()
    params = state.abstract_params(recipe.init, toy.mesh_of(1, 1, 1))
    trainable = jax.tree.map(lambda _: False, params)
    trainable["up"] = jax.tree.map(lambda _: True, trainable["up"])
    _, start = build(recipe, trainable=trainable)
    first = jax.device_get(start.params)
    after, losses = run(recipe, trainable=trainable)
    for name in first:
        for key, value in first[name].items():
            same = np.array_equal(value, after.params[name][key])
            assert same == (name != "up"), (name, key)
    moments = len(jax.tree.leaves(after.opt_state))
    assert moments < len(jax.tree.leaves(run(recipe, steps=1)[0].opt_state))
    assert np.all(np.isfinite(losses))


def test_dropout_depends_on_seed_and_step_only():
    recipe = toy.make_recipe(dropout=0.5)
    step_fn, first = build(recipe)
    first = jax.device_get(first)

    def loss(step, step_fn=step_fn):
        current = dataclasses.replace(first, step=np.int32(step))
        _, metrics = step_fn(jax.device_put(current), place(recipe, 0))
        return float(metrics["loss"][0])

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    assert loss(0) != loss(0, build(recipe, seed=1)[0])
